"""Pairs on disk -> training patches and validation photos; demo data."""

import bisect

import inspect

import itertools

import os

import shutil

import zlib

from collections.abc import Iterable, Iterator, Sequence

from pathlib import Path

import numpy as np

import skimage

import torch

from PIL import Image

from torch import Tensor, nn

from torch.utils.data import DataLoader, Dataset

from tqdm import tqdm

import estimator

from checkpoints import fingerprint

from degradations import Mixture, random_degradation

from files import growing_file, read_torch_file, write_torch_file, atomic_write

from estimator import log_power_spectrum, transform_spectrum

from models import run_tiled

from patches import as_batch, crop_and_augment, sample_index, generator_of, random_window, to_pixels, to_tensor

from photos import DecodedPhotos, PixelFile, list_problems, read_photo, remove_files

from processes import rank, print0, per_rank_batch_size

from utils import UserError, autocast, autocast_dtype

import zlib

from collections.abc import Iterable

from pathlib import Path

import torch

from torch import Tensor

from torch.utils.data import Dataset

from dataset import too_small

from degradations import Mixture, chance, random_degradation, shrink

from estimator import log_power_spectrum, transform_spectrum

from patches import as_batch, crop_and_augment, sample_index, generator_of, random_window, to_pixels, to_tensor

from photos import DecodedPhotos, list_problems

from utils import UserError

from collections.abc import Sequence

from functools import lru_cache

import numpy as np

import torch

from torch import Tensor

class PairedImageDataset(Dataset):
    """Pairs of photos ``ROOT/NNN/{blurry,sharp}.png``; NNN is any name.

    An item is (blurry, sharp), each (3, H, W) float32 RGB in [0, 1]: item k is the k-th photo, whole, in the order of
    the folders' names. ``len()`` counts the photos.
    With ``patch_size``, item k is the k-th patch of an endless training: a random place of a random photo,
    flipped and turned at random, the same for all parts; each run through the photos takes each once. It
    depends on ``seed`` and k alone, so any k >= 0 can be asked for, in any order and from any process, and an
    interrupted training goes on exactly where it was. A third part of such an item is what ``gauge.describe`` says of the
    whole blurry photo, (2, 64, 33), turned alike. After ``ask_once`` the teacher's answer takes the place of sharp, after
    ``find_blurs_once`` what a network makes of the description takes the place of that.

    Raises:
        UserError: naming everything that is wrong with the folder at once: missing halves, unequal sizes,
            unreadable files, photos smaller than the patch, or no pairs at all.
    """

    def __init__(self, root: Path | str, patch_size: int | None = None, seed: int = 0):
        self.root, self.patch_size, self.seed = Path(root), patch_size, seed
        self.folders = find_pairs(self.root)
        paths = [folder / name for folder in self.folders for name in ("blurry.png", "sharp.png")]
        photos = DecodedPhotos(paths, self.root / ".cache")  # 2 i is blurry, 2 i + 1 is sharp
        self.key, self.shapes = photos.key, photos.shapes[::2]
        self._check_sizes(photos.shapes[1::2])
        self.cache = photos.cache
        # (H, W, 3) uint8 each, on the disk or, after load_onto, on the device
        self.blurry: Sequence = photos.every_second(0)
        self.sharp: Sequence = photos.every_second(1)
        self.target: Sequence = self.sharp
        self.on_device = False
        if patch_size:
            self.spectra = torch.from_numpy(self._describe_once())
            self.blurs: Tensor | None = None

    def _check_sizes(self, sharp_shapes: list[tuple[int, int]]) -> None:
        problems = []
        for folder, (height, width), sharp in zip(self.folders, self.shapes, sharp_shapes, strict=True):
            if (height, width) != sharp:
                problems.append(
                    f"{folder}: blurry.png is {width}x{height}, sharp.png is {sharp[1]}x{sharp[0]}: "
                    "both must show the same pixels, crop or scale one"
                )
            elif self.patch_size and min(height, width) < self.patch_size:
                problems.append(too_small(folder, (height, width), self.patch_size))
        if problems:
            raise UserError(list_problems(problems))

    def __len__(self) -> int:
        return len(self.folders)

    def __getitem__(self, k: int) -> tuple[Tensor, ...]:
        if self.patch_size:
            return tuple(part[0] for part in self.batch([k]))
        return self.whole(range(len(self))[k])  # IndexError past the end, which is what ends a for loop

    def whole(self, index: int, draw: int = 0) -> tuple[Tensor, Tensor]:
        """Photo ``index``, blurry and sharp, (3, H, W) each; there is one version of it, whatever ``draw`` is."""
        return to_tensor(self.blurry[index]), to_tensor(self.sharp[index])

    def batch(self, items: Iterable[int]) -> list[Tensor]:
        """The patches ``items`` at once, (N, 3, S, S) blurry and target, and (N, 2, 64, 33) of the whole photos.

        Faster than stacking them: bytes become floats last.
        """
        blurry, target, spectra = [], [], []
        for k in items:
            index, generator = sample_index(k, len(self), self.seed)
            window = random_window(self.shapes[index], self.patch_size, generator)
            turn = int(torch.randint(8, (), generator=generator))
            blurry.append(crop_and_augment(self.blurry, index, window, turn))
            target.append(crop_and_augment(self.target, index, window, turn))
            known = self.blurs is not None
            spectra.append(self.blurs[index, turn] if known else transform_spectrum(self.spectra[index], turn))
        return [as_batch(blurry), as_batch(target), torch.stack(spectra)]

    def _describe_once(self) -> np.ndarray:
        """What ``describe`` says of each blurry photo, (n, 2, 64, 33), kept beside the decoded photos."""
        code = zlib.crc32(inspect.getsource(estimator).encode())  # other code may say something else of a photo
        file = self.cache / f"{self.key}-{code:08x}.descriptions"
        count = len(self) * 2 * 64 * 33
        if not file.is_file() or file.stat().st_size != 4 * count:

            def write(partial: Path) -> None:
                bar = tqdm(range(len(self)), "describing photos once", unit="photo", leave=False, disable=None)
                with open(partial, "wb") as out:
                    for index in bar:
                        out.write(log_power_spectrum(to_tensor(self.blurry[index])[None]).numpy().data)

            remove_files(self.cache.glob(f"{self.key}*.descriptions"))
            atomic_write(file, write)
        return np.fromfile(file, np.float32, count).reshape(len(self), 2, 64, 33)

    def cache_teacher_outputs(self, teacher: nn.Module, device: torch.device, weight: float = 1.0) -> None:
        """Ask ``teacher`` about each whole blurry photo, unless it is known; its answers become the targets.

        They are kept beside the decoded photos as the 8-bit pictures they would be saved as. Rounding adds an error
        of 59 dB PSNR, of no direction; a student is some 35 dB away from its teacher.

        Args:
            weight: of the answer in the target, 0 to 1; the rest is the sharp photo.
        """
        dtype = autocast_dtype(device)
        name = f"{self.key}-{fingerprint(teacher)}"
        file = self.cache / f"{name}-{weight:g}-{str(dtype).removeprefix('torch.')}.answers"
        answers = PixelFile(file, self.shapes)
        if not answers.is_complete():
            of_others = (p for p in self.cache.glob(f"{self.key}-*.answers") if not p.name.startswith(name))
            remove_files(of_others)
            self._ask_all(teacher, device, weight, file)
        self.target = answers

    @torch.no_grad()
    def _ask_all(self, teacher: nn.Module, device: torch.device, weight: float, file: Path) -> None:
        """Write all answers to ``file``; after an interruption from the first that is not whole."""
        ends = [0, *itertools.accumulate(3 * height * width for height, width in self.shapes)]  # bytes
        with growing_file(file) as out:
            done = bisect.bisect_right(ends, out.seek(0, os.SEEK_END)) - 1
            out.truncate(ends[done])
            todo = range(done, len(self))
            bar = tqdm(todo, "asking the teacher once", len(self), initial=done, unit="photo", leave=False, disable=None)
            for index in bar:
                blurry = to_tensor(self.blurry[index])[None].to(device, memory_format=torch.channels_last)
                with autocast(device):
                    answer = run_tiled(teacher, blurry)
                target = to_tensor(self.sharp[index]).to(device).lerp(answer[0].float().clamp(0, 1), weight)
                out.write(np.ascontiguousarray(to_pixels(target)).data)

    @torch.no_grad()
    def cache_blur_embeddings(self, network: nn.Module, device: torch.device) -> None:
        """Keep ``network.find_blur`` of each photo in each of its eight turns; for a ``network`` that does not train it."""
        file = self.cache / f"{self.key}-{fingerprint(network)}.blurs"
        if not file.is_file():
            remove_files(self.cache.glob(f"{self.key}-*.blurs"))
            bar = tqdm(self.spectra, "finding blurs once", unit="photo", leave=False, disable=None)
            turns = (torch.stack([transform_spectrum(spectrum, turn) for turn in range(8)]) for spectrum in bar)
            write_torch_file(file, torch.stack([network.embed_blur(each.to(device)).cpu() for each in turns]))
        self.blurs = read_torch_file(file)

    def load_onto(self, device: torch.device, room: int) -> None:
        """Move all pixels to ``device`` if they take at most ``room`` bytes there; patches are then cut on it."""
        stores = self.blurry, self.target
        if sum(store.nbytes for store in stores) > room:
            return
        self.blurry, self.target = ([torch.from_numpy(np.array(pixels)).to(device) for pixels in s] for s in stores)
        self.on_device = True

# Photos of one source are about equally crisp; a network that has seen no others takes a crisper one for blurry and
# overdoes it. A photo that is shrunk is crisper than before
SHRUNK = 0.5  # share of the blurry photos that are made of photos shrunk by a factor of 1 to 2

PATCHES_PER_VERSION = 8  # patches that are cut from a photo before it is blurred anew: a whole photo's blur takes as long as ten patches

class SyntheticBlurDataset(Dataset):
    """Sharp photos of a folder, blurred on the fly by ``degradations.random_degradation``.

    Items, ``patch_size``, ``seed`` and errors as ``PairedImageDataset``; without ``patch_size`` photo k is always
    blurred in the same way.

    A photo is blurred whole, and LAPS patches are cut from it before it is blurred anew; till then it stays in memory,
    six bytes a pixel, in each process that cuts patches.

    Args:
        paths: the photos' files, as ``photos.find_photos`` lists them.
        cache: the folder where their pixels are kept after decoding.
    """

    def __init__(
        self,
        paths: list[Path],
        cache: Path | str,
        patch_size: int | None = None,
        seed: int = 0,
        mixture: Mixture | None = None,
    ):
        self.patch_size, self.seed, self.mixture = patch_size, seed, mixture or Mixture()
        self.photos = DecodedPhotos(list(paths), Path(cache))
        self.key = f"{self.photos.key}-{zlib.crc32(repr(self.mixture).encode()):08x}"
        self.bytes_in_memory = sum(6 * height * width for height, width in self.photos.shapes)  # of each process
        self.blurred: dict[int, tuple] = {}  # photo -> the version that patches are being cut from
        small = [
            too_small(path, shape, patch_size)
            for path, shape in zip(paths, self.photos.shapes, strict=True)
            if patch_size and min(shape) < patch_size
        ]
        if small:
            raise UserError(list_problems(small))

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor]:
        if not self.patch_size:
            index = range(len(self))[k]
            sharp = to_tensor(self.photos[index])
            return random_degradation(sharp, generator_of(self.seed, 2, index), self.mixture), sharp
        return tuple(part[0] for part in self.batch([k]))

    def whole(self, index: int, draw: int = 0) -> tuple[Tensor, Tensor]:
        """Version ``draw`` of photo ``index``, blurry and sharp, (3, H, W) each; half of them are shrunk before."""
        generator = generator_of(self.seed, 3, draw * len(self) + index)
        sharp, least = to_tensor(self.photos[index]), self.patch_size or 1
        factor = min(1 + chance(generator), min(sharp.shape[1:]) / least)
        if chance(generator) < SHRUNK:
            sharp = shrink(sharp, tuple(max(least, round(length / factor)) for length in sharp.shape[1:]))
        return random_degradation(sharp, generator, self.mixture), sharp

    def batch(self, items: Iterable[int]) -> list[Tensor]:
        """The patches ``items`` at once, as ``PairedImageDataset.batch``."""
        blurry, sharp, spectra = [], [], []
        for k in items:
            index, generator = sample_index(k, len(self), self.seed)
            photos, spectrum = self._version(index, k // len(self) // PATCHES_PER_VERSION)
            window = random_window(photos[0].shape[:2], self.patch_size, generator)
            turn = int(torch.randint(8, (), generator=generator))
            blurry.append(crop_and_augment(photos, 0, window, turn))
            sharp.append(crop_and_augment(photos, 1, window, turn))
            spectra.append(transform_spectrum(spectrum, turn))
        return [as_batch(blurry), as_batch(sharp), torch.stack(spectra)]

    def _version(self, index: int, draw: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Blurry and sharp, (H, W, 3) bytes, and the description of version ``draw``; kept until the next is asked for."""
        if self.blurred.get(index, (None,))[0] != draw:
            blurry, sharp = self.whole(index, draw)
            pixels = tuple(torch.from_numpy(to_pixels(photo)) for photo in (blurry, sharp))
            self.blurred[index] = draw, pixels, log_power_spectrum(blurry[None])[0]
        return self.blurred[index][1:]

def find_pairs(root: Path) -> list[Path]:
    """The folders of ``root`` that hold blurry.png and sharp.png, sorted; hidden ones are passed over."""
    if not root.is_dir():
        raise UserError(f"{root} is not a folder: put pairs there as {root}/001/blurry.png and {root}/001/sharp.png")
    twin = root.with_name({"train": "val", "val": "train"}.get(root.name, root.name))
    if twin != root and twin.exists() and os.path.samefile(root, twin):
        raise UserError(f"{root} and {twin} are one folder: validate on other pairs than those to train on")
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not folders:
        raise UserError(f"{root} holds no pairs: put them there as {root}/001/blurry.png and {root}/001/sharp.png")
    missing = [
        f"{folder / name} is missing: each folder holds blurry.png and sharp.png"
        for folder in folders
        for name in ("blurry.png", "sharp.png")
        if not (folder / name).is_file()
    ]
    if missing:
        raise UserError(list_problems(missing))
    return folders

def batches_of_one_size(photos: Dataset, indices: range) -> Iterator[tuple[Tensor, Tensor]]:
    """(blurry, sharp) of ``photos[i]`` for each index, neighbours of one size together: (n, 3, H, W) each, n <= 8."""
    waiting: list[tuple[Tensor, Tensor]] = []
    for index in indices:
        pair = photos[index]
        pixels = pair[0].shape[-2] * pair[0].shape[-1]
        if waiting and (waiting[0][0].shape != pair[0].shape or (len(waiting) + 1) * pixels > 2**21 or len(waiting) == 8):
            yield tuple(torch.stack(part) for part in zip(*waiting, strict=True))
            waiting = []
        waiting.append(pair)
    if waiting:
        yield tuple(torch.stack(part) for part in zip(*waiting, strict=True))

def too_small(path: Path, shape: tuple[int, int], patch_size: int) -> str:
    return f"{path}: {shape[1]}x{shape[0]} is smaller than the patch of {patch_size}: lower PATCH_SIZE or remove it"

def generator_of(*numbers: int) -> torch.Generator:
    """A stream of chance of its own for each tuple, of one length, of whole numbers >= 0."""
    state = np.random.SeedSequence(numbers).generate_state(1)[0]  # torch itself would use the low 32 bits of a seed only
    return torch.Generator().manual_seed(int(state))

def sample_index(k: int, photos: int, seed: int) -> tuple[int, torch.Generator]:
    """Photo of item k of an endless training, and the generator for all that is drawn after it."""
    lap, position = divmod(k, photos)
    return pass_order(photos, seed, lap)[position], generator_of(seed, 1, k)

@lru_cache(maxsize=4)  # a lap is asked for once per photo
def pass_order(photos: int, seed: int, lap: int) -> list[int]:
    return torch.randperm(photos, generator=generator_of(seed, 0, lap)).tolist()

def random_window(shape: tuple[int, int], size: int, generator: torch.Generator) -> tuple[slice, slice]:
    """Rows and columns of a random square of ``size`` pixels in a photo of (H, W)."""
    top, left = (int(torch.randint(length - size + 1, (), generator=generator)) for length in shape)
    return slice(top, top + size), slice(left, left + size)

def crop_and_augment(photos: Sequence, index: int, window: tuple[slice, slice], turn: int) -> np.ndarray | Tensor:
    """A (S, S, 3) patch of photo ``index``, (H, W, 3); ``turn`` 0-3 quarter turns, 4-7 mirrored first.

    Args:
        photos: tensors, or a ``photos.PixelFile``.
    """
    patch = photos.crop(index, *window) if hasattr(photos, "crop") else photos[index][window]
    if isinstance(patch, Tensor):
        return (patch.flip(1) if turn >= 4 else patch).rot90(turn % 4, (0, 1))
    patch = patch.view("V3")  # a pixel as one item of three bytes: three times faster to turn
    return np.ascontiguousarray(np.rot90(patch[:, ::-1] if turn >= 4 else patch, turn % 4)).view(np.uint8)

def as_batch(patches: list[np.ndarray | Tensor]) -> Tensor:
    """N patches of (S, S, 3) bytes -> (N, 3, S, S) float32 in [0, 1]."""
    stacked = torch.stack(patches) if isinstance(patches[0], Tensor) else torch.from_numpy(np.stack(patches))
    return to_tensor(stacked)

def to_tensor(pixels: np.ndarray | Tensor) -> Tensor:
    """(..., H, W, 3) -> (..., 3, H, W) float32, uint8 scaled to [0, 1].

    The channels of a pixel stay neighbours in memory, as in ``torch.channels_last``.
    """
    image = pixels if isinstance(pixels, Tensor) else torch.from_numpy(np.array(pixels))
    scaled = image.float().div_(255) if image.dtype == torch.uint8 else image.float()  # image / 255 takes 14 times longer
    return scaled.movedim(-1, -3)

def to_pixels(image: Tensor) -> np.ndarray:
    """(3, H, W) float, clamped to [0, 1] -> (H, W, 3) uint8."""
    return (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
