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

import gauge
from checkpoints import fingerprint
from degradations import Mixture, random_degradation
from files import growing_file, read_torch_file, write_torch_file, write_whole
from gauge import describe, turned_spectrum
from models import run_tiled
from patches import as_batch, cut, draw_photo, generator_of, random_window, to_pixels, to_tensor
from photos import DecodedPhotos, PixelFile, list_problems, read_photo, remove_files
from processes import rank, say, share_of_batch
from utils import UserError, autocast, autocast_dtype


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
            self.descriptions = torch.from_numpy(self._describe_once())
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
        blurry, target, descriptions = [], [], []
        for k in items:
            index, generator = draw_photo(k, len(self), self.seed)
            window = random_window(self.shapes[index], self.patch_size, generator)
            turn = int(torch.randint(8, (), generator=generator))
            blurry.append(cut(self.blurry, index, window, turn))
            target.append(cut(self.target, index, window, turn))
            known = self.blurs is not None
            descriptions.append(self.blurs[index, turn] if known else turned_spectrum(self.descriptions[index], turn))
        return [as_batch(blurry), as_batch(target), torch.stack(descriptions)]

    def _describe_once(self) -> np.ndarray:
        """What ``describe`` says of each blurry photo, (n, 2, 64, 33), kept beside the decoded photos."""
        code = zlib.crc32(inspect.getsource(gauge).encode())  # other code may say something else of a photo
        file = self.cache / f"{self.key}-{code:08x}.descriptions"
        count = len(self) * 2 * 64 * 33
        if not file.is_file() or file.stat().st_size != 4 * count:

            def write(partial: Path) -> None:
                bar = tqdm(range(len(self)), "describing photos once", unit="photo", leave=False, disable=None)
                with open(partial, "wb") as out:
                    for index in bar:
                        out.write(describe(to_tensor(self.blurry[index])[None]).numpy().data)

            remove_files(self.cache.glob(f"{self.key}*.descriptions"))
            write_whole(file, write)
        return np.fromfile(file, np.float32, count).reshape(len(self), 2, 64, 33)

    def ask_once(self, teacher: nn.Module, device: torch.device, weight: float = 1.0) -> None:
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
    def find_blurs_once(self, network: nn.Module, device: torch.device) -> None:
        """Keep ``network.find_blur`` of each photo in each of its eight turns; for a ``network`` that does not train it."""
        file = self.cache / f"{self.key}-{fingerprint(network)}.blurs"
        if not file.is_file():
            remove_files(self.cache.glob(f"{self.key}-*.blurs"))
            bar = tqdm(self.descriptions, "finding blurs once", unit="photo", leave=False, disable=None)
            turns = (torch.stack([turned_spectrum(description, turn) for turn in range(8)]) for description in bar)
            write_torch_file(file, torch.stack([network.find_blur(each.to(device)).cpu() for each in turns]))
        self.blurs = read_torch_file(file)

    def load_onto(self, device: torch.device, room: int) -> None:
        """Move all pixels to ``device`` if they take at most ``room`` bytes there; patches are then cut on it."""
        stores = self.blurry, self.target
        if sum(store.nbytes for store in stores) > room:
            return
        self.blurry, self.target = ([torch.from_numpy(np.array(pixels)).to(device) for pixels in s] for s in stores)
        self.on_device = True


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


class Batches(Dataset):
    """Item s is the batch of training step s: patches s * ``batch_size`` and on, shared out in order over processes.

    Args:
        share: patches for each process.
    """

    def __init__(self, train_set: Dataset, batch_size: int, rank: int, share: int):
        self.train_set, self.batch_size, self.rank, self.share = train_set, batch_size, rank, share

    def __getitem__(self, step: int) -> list[Tensor]:
        start = step * self.batch_size + self.rank * self.share
        return self.train_set.batch(range(start, start + self.share))


def start_batches(
    train_set: Dataset, device: torch.device, steps: range, batch_size: int, workers: int
) -> Iterator[list[Tensor]]:
    """What ``train_set.batch`` gives for each of ``steps``, as far as it falls to this process."""
    on_device = getattr(train_set, "on_device", False)  # then patches are cut there, by this process
    loader = DataLoader(
        Batches(train_set, batch_size, rank(), share_of_batch(batch_size)),
        batch_size=None,  # an item is a batch already
        sampler=steps,
        num_workers=0 if on_device else workers,
        pin_memory=device.type == "cuda" and not on_device,
    )
    random_state = torch.get_rng_state()
    batches = iter(loader)
    torch.set_rng_state(random_state)  # starting the loader drew from it, which an interruption must not repeat
    return without_traceback(batches)


def without_traceback(batches: Iterator) -> Iterator:
    """The same; that a worker process ended is told in a sentence."""
    try:
        yield from batches
    except (RuntimeError, ConnectionError, EOFError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        raise UserError(
            "a process that cuts patches has ended, perhaps for want of memory: run again to go on, with NUM_WORKERS = 0"
        ) from None


# Demo data

DEMO_TILE = 144  # pixels
DEMO_PHOTOS = {  # sample photos inside scikit-image, and how many tiles of each; no photo is in both
    "train": {"astronaut.png": 9, "motorcycle_left.png": 15, "chelsea.png": 6, "rocket.jpg": 2},
    "val": {"coffee.png": 8},
}
# The middle of the mixture's ranges: eight photos that hardly need sharpening would show nothing
DEMO_MIXTURE = Mixture(
    identity=0,
    blurs={"gaussian": 0.4, "anisotropic": 0.2, "defocus": 0.3, "line": 0.05, "shake": 0.05},
    sigma=(0.8, 2.5),
    radius=(1.5, 3.5),
    line_length=(3, 10),
    shake_length=(4, 14),
    noise_sigma=(0.2, 1.5),
    jpeg=0.15,
    quality=(60, 95),
)
DEMO_NOTE = "Demo pairs, cut from the sample photos of scikit-image and blurred by degradations.py. Delete at will.\n"


def find_or_make_data(root: Path | str) -> Path:
    """The folder with train/ and val/: ``root`` if the user has put anything there, else demo data in ``root``/demo."""
    root = Path(root)
    if os.path.lexists(root) and not root.is_dir():
        raise UserError(f"{root} is not a folder: DATA must be a folder with train/ and val/")
    for part in ("train", "val"):
        folder = root / part
        if folder.exists() and (not folder.is_dir() or any(not p.name.startswith(".") for p in folder.iterdir())):
            return root
    stray = next(root.glob("*/blurry.png"), None)
    if stray:
        raise UserError(f"{stray} is not where it is looked for: move pairs to {root}/train/NNN/ and {root}/val/NNN/")
    make_demo_data(root / "demo")
    say(f"{root} holds no pairs, so this is demo data: small tiles of scikit-image's sample photos, in {root / 'demo'};")
    say("prepare_data.py makes pairs of your own photos, and weights/student.pth has learned from many more than these")
    return root / "demo"


def make_demo_data(root: Path | str) -> None:
    """Write 32 training and 8 validation pairs of 144x144 pixels to ``root``/{train,val}/NNN, without a download.

    Demo data that is already there stays as it is.

    Raises:
        UserError: if ``root`` holds anything else, which is never touched, or cannot be written.
    """
    root = Path(root)
    note = root / "DEMO.txt"
    is_ours = note.is_file() and note.read_text(errors="replace") == DEMO_NOTE
    if is_ours and (root / "train").is_dir() and (root / "val").is_dir():
        return
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(f"{root} holds files that are not demo data: move them away, or name another folder")
    partial = root.with_name(f".{root.name}.{os.getpid()}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a killed process that had this number
        for part, photos in DEMO_PHOTOS.items():
            tiles = [tile for name, count in photos.items() for tile in _cut_tiles(name, count)]
            for k, sharp in enumerate(tiles, start=1):
                blurry = random_degradation(to_tensor(sharp), generator_of(len(part), k), DEMO_MIXTURE)
                folder = partial / part / f"{k:03d}"
                folder.mkdir(parents=True)
                Image.fromarray(to_pixels(blurry)).save(folder / "blurry.png")
                Image.fromarray(sharp).save(folder / "sharp.png")
        (partial / note.name).write_text(DEMO_NOTE)
        if root.exists():
            root.rmdir()
        os.replace(partial, root)  # whole or not at all
    except OSError as error:
        raise UserError(f"demo data cannot be written to {root} ({error}): free some space or check the folder") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _cut_tiles(name: str, count: int) -> list[np.ndarray]:
    """The ``count`` tiles with the most detail of a sample photo of scikit-image, (DEMO_TILE, DEMO_TILE, 3) uint8."""
    path = Path(skimage.__file__).parent / "data" / name
    if not path.is_file():
        raise UserError(f"scikit-image {skimage.__version__} lacks its sample photo {name}: put pairs of your own in data/")
    photo = read_photo(path)
    rows, columns = (range(0, length - DEMO_TILE + 1, DEMO_TILE) for length in photo.shape[:2])
    tiles = [photo[top : top + DEMO_TILE, left : left + DEMO_TILE].copy() for top in rows for left in columns]
    return sorted(tiles, key=lambda tile: -np.abs(np.diff(tile.astype(np.int16), axis=0)).mean())[:count]
