"""Photos on disk -> training patches and whole validation photos.

``PairedImageDataset`` reads blurry/sharp pairs, ``SyntheticBlurDataset`` blurs sharp photos on the fly. Both have

- ``dataset[k]``: without ``patch_size`` the whole photo k, (blurry, sharp), (3, H, W) each; with it patch k of an endless
  training, (blurry, target, spectra, input_mse): a for loop over it never ends. Patch k is a random crop of a random
  photo, randomly flipped and rotated; each pass over the photos takes each once. It depends on ``seed`` and k alone, so
  that any k >= 0 can be read in any order, from any process, and a resumed training sees exactly the patches it would
  have seen. Do not use a shuffling ``DataLoader``: it takes k < len(dataset) only, the same few patches in every epoch.
  ``input_mse`` is the mean squared error of the blurry photo that the patch is from (of pairs: of every fourth row).
- ``dataset[range]``: those patches at once, as the training loop takes them: [blurry, target, spectra, input_mse]. The
  images are (N, 3, S, S). The spectra, (N, 9, 64, 33), are the ``log_power_spectrum`` of the patch's surroundings and the
  ``photo_spectra`` of its photo; blur embeddings, (N, 637), may take their place. The last is (N,).
- ``dataset.whole(index, blur_version)``: a blurry and a sharp photo to train the blur estimator on, (3, H, W) each.
- ``dataset.key``: changes with the content of any photo.
- ``dataset.check_disjoint(other)``: raises ``UserError`` if a photo is in both.
"""

import difflib
import os
import zlib
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from blur.degradations import Mixture, random_degradation, resize
from blur.local import SURROUNDINGS, surroundings
from blur.noise import photo_spectra
from blur.spectrum import log_power_spectrum, transform_spectrum
from blur.variety import vary_photo
from images.photos import FORMATS, SYSTEM_FOLDERS, DecodedPhotos, PixelFile, raise_problems
from utils import UserError, chance, choose, log_uniform, make_generator, print0, to_pixels, to_tensor

# Photos from one source are about equally crisp. A network that has seen no others over-sharpens a crisper one, or takes its
# texture for noise; a photo that was shrunk is crisper than before
SHRUNK = 0.6  # share of the synthetic pairs whose photo is shrunk before it is blurred
LARGEST_FACTOR = 3.0  # of shrinking, which is drawn log-uniformly; the result is never smaller than SURROUNDINGS
ALIASED = 0.15  # share of the shrunk photos that are subsampled without a filter, which are crisper still
# A photo may be soft by itself. A network that has seen crisp ones alone makes more of it than there was
ENLARGED = 0.2  # share of the synthetic pairs whose photo is enlarged before it is blurred
ENLARGED_BY = (1.1, 1.8)  # range of the factor, which is drawn log-uniformly
VERSION_SIZE = 480  # pixels; of a larger photo, a random part of this size is blurred
ORDER, PATCH, VALIDATION, VERSION = range(4)  # independent random streams of one seed
MIXTURE = Mixture()
PATCHES_PER_VERSION = 8  # patches cut from a photo before it is blurred again: blurring takes as long as ten patches


class PatchDataset(Dataset):
    """What both data sets share; they define ``whole(index)`` and ``patch(k)``, and have a ``patch_size`` and
    ``paths_by_content``."""

    def __getitem__(self, k: int | range) -> Sequence[Tensor]:
        if isinstance(k, range):
            *images, spectra, errors = zip(*map(self.patch, k), strict=True)
            blurry, targets = (to_tensor(torch.from_numpy(np.stack(each))) for each in images)
            return [blurry, targets, torch.stack(spectra), torch.tensor(errors)]
        if self.patch_size:
            return tuple(part[0] for part in self[range(k, k + 1)])
        return self.whole(range(len(self))[k])  # raises IndexError past the end, which ends a for loop

    def check_disjoint(self, other: "PatchDataset") -> None:
        """Raise ``UserError`` if a photo of this data set is in the ``other``, too, whatever its name."""
        ours, theirs = self.paths_by_content, other.paths_by_content
        if common := sorted((path, theirs[content]) for content, path in ours.items() if content in theirs):
            count = f" (and {len(common) - 1} more like these)" if len(common) > 1 else ""
            both = " and ".join(map(str, common[0]))
            raise UserError(f"{both} are the same picture{count}: train on other photos than those to validate on")


class PairedImageDataset(PatchDataset):
    """Pairs ``root/NNN/{blurry,sharp}.png``, in the order of their folders' names; NNN is any name.

    Args:
        need_sharp: if False, sharp.png may be missing, and blurry.png stands in its place until ``targets`` is replaced.
    Attributes:
        paired: for each photo, whether there is a sharp.png.
        targets: what the patches are paired with: the sharp photos, until the training puts the teacher's outputs there.
        embeddings: (n, 8, 637) blur embeddings (``embed_blur``) of each photo in its eight orientations, which then replace
            the spectra.
    Raises:
        UserError: listing everything that is wrong with the folder: missing or unreadable files, different sizes,
            photos smaller than the patch, pairs that show different scenes, or no pairs at all.
    """

    def __init__(self, root: Path | str, patch_size: int | None = None, seed: int = 0, need_sharp: bool = True):
        self.root, self.patch_size, self.seed = Path(root), patch_size, seed
        self.folders = find_pairs(self.root, need_sharp)
        self.paired = [(folder / "sharp.png").is_file() for folder in self.folders]
        names = [("blurry.png", "sharp.png" if paired else "blurry.png") for paired in self.paired]
        paths = [folder / name for folder, both in zip(self.folders, names, strict=True) for name in both]
        photos = DecodedPhotos(paths, self.root / ".cache")
        self.key, self.cache, self.paths_by_content = photos.key, photos.cache, photos.paths_by_content
        self.blurry, self.sharp = photos.subset(0), photos.subset(1)  # they alternate
        self.shapes = self.blurry.shapes
        problems = [
            f"{folder}: blurry.png is {width}x{height}, sharp.png is {sharp[1]}x{sharp[0]}: "
            "both must have the same size, crop or scale one"
            for folder, (height, width), sharp in zip(self.folders, self.shapes, self.sharp.shapes, strict=True)
            if (height, width) != sharp
        ]
        raise_problems(problems + small_photos(self.folders, self.shapes, patch_size))
        self.compare_pairs()
        self.targets: PixelFile = self.sharp
        self.embeddings: Tensor | None = None
        self.errors: dict[int, float] = {}  # photo -> input_mse

    def __len__(self) -> int:
        return len(self.folders)

    def compare_pairs(self) -> None:
        """Compare the photos of up to a hundred pairs; a line is printed if more than a tenth are shifted.

        Raises ``UserError`` if any show different scenes or, of training pairs, if all compared are equal.
        """
        paired = [index for index, paired in enumerate(self.paired) if paired]
        problems, equal, shifted, compared = [], 0, [], paired[:: max(1, len(paired) // 50)]
        for index in compared:
            folder, blurry, sharp = self.folders[index], self.blurry[index], self.sharp[index]
            equal += np.array_equal(blurry, sharp)
            if show_two_scenes(blurry, sharp):
                what = "blurry.png and sharp.png show different scenes: take both from one photo, turned alike"
                problems.append(f"{folder}: {what}")
            elif shift := shift_between(blurry, sharp):
                shifted.append(f"{folder}, whose blurry.png fits if it is moved by {shift[0]} rows and {shift[1]} columns")
        if self.patch_size and equal == len(compared) > 2:  # a few may be equal: there is nothing to do for sharp photos
            problems.append(f"{self.root}: blurry.png and sharp.png are equal in all pairs compared: replace one of them")
        if len(shifted) > len(compared) / 10:  # a curved shake may look like a shift, in one of a thousand
            print0(f"{len(shifted)} of {len(compared)} pairs looked at are shifted, such as {shifted[0]}: align them")
        raise_problems(problems)

    def whole(self, index: int, blur_version: int | None = None) -> tuple[Tensor, Tensor]:
        """Photo ``index``, blurry and sharp, (3, H, W) each; ``blur_version`` is ignored, there is only one."""
        return to_tensor(self.blurry[index]), to_tensor(self.sharp[index])

    def input_mse(self, index: int) -> float:
        """Mean squared error of every fourth row of blurry photo ``index``, to the sharp one or else to its target."""
        if index not in self.errors:
            reference = self.sharp if self.paired[index] else self.targets
            self.errors[index] = mean_squared_error(self.blurry[index][::4], reference[index][::4])
        return self.errors[index]

    @cached_property
    def spectra(self) -> Tensor:
        """``photo_spectra`` of each blurry photo, (n, 7, 64, 33)."""
        return torch.cat([photo_spectra(to_tensor(photo)[None]) for photo in self.blurry])

    def patch(self, k: int) -> tuple[np.ndarray, np.ndarray, Tensor, float]:
        """Blurry and target, (S, S, 3) uint8 each, spectra or embedding, and ``input_mse``."""
        index, generator = sample_index(k, len(self), self.seed)
        window = random_window(self.shapes[index], self.patch_size, generator)
        dihedral = choose(range(8), generator)
        if self.embeddings is not None:
            blur = self.embeddings[index, dihedral]
        else:
            region = self.blurry.crop(index, *patch_surroundings(window, self.shapes[index]))
            blur = patch_spectra(region, self.spectra[index], dihedral)
        blurry, target = (augment(photos.crop(index, *window), dihedral) for photos in (self.blurry, self.targets))
        return blurry, target, blur, self.input_mse(index)


class SyntheticBlurDataset(PatchDataset):
    """Sharp photos, blurred on the fly by ``degradations.random_degradation``.

    A photo is blurred as a whole, or a part of VERSION_SIZE of it, and PATCHES_PER_VERSION patches are cut from it before
    it is blurred again; until then it stays in memory, six bytes a pixel. Of several processes each blurs the photos of its
    own patches, so that they share fewer. Without ``patch_size`` photo k is blurred as a whole, always in the same way. The
    decoded photos are stored in ``cache``.

    Raises:
        UserError: listing every photo that cannot be read or is smaller than the patch.
    """

    def __init__(
        self, paths: list[Path], cache: Path, patch_size: int | None = None, seed: int = 0, mixture: Mixture = MIXTURE
    ):
        self.patch_size, self.seed, self.mixture = patch_size, seed, mixture
        self.photos = DecodedPhotos(paths, cache)
        self.paths_by_content = self.photos.paths_by_content
        raise_problems(small_photos(paths, self.photos.shapes, patch_size))
        self.key = f"{self.photos.key}-{zlib.crc32(repr(self.mixture).encode()):08x}"
        self.version_size = max(VERSION_SIZE, patch_size or 0)
        self.versions: dict[int, tuple] = {}  # photo -> its latest version: number, blurry, sharp, photo_spectra, input_mse

    def __len__(self) -> int:
        return len(self.photos)

    def whole(self, index: int, blur_version: int | None = None) -> tuple[Tensor, Tensor]:
        """Photo ``index``, blurry and sharp, (3, H, W) each.

        Without ``blur_version`` always degraded alike, to validate on. With it one of any number of versions to train on,
        each resized, varied, cut to ``version_size`` and degraded in its own way.
        """
        sharp = to_tensor(self.photos[index])
        if blur_version is None:
            return random_degradation(sharp, make_generator(self.seed, VALIDATION, index), self.mixture)
        generator = make_generator(self.seed, VERSION, blur_version * len(self) + index)
        smallest = max(self.patch_size or 1, SURROUNDINGS)
        largest = max(1.0, min(LARGEST_FACTOR, min(sharp.shape[1:]) / smallest))
        drawn, factor = chance(generator), 1.0
        if drawn < SHRUNK:
            factor = log_uniform((1.0, largest), generator)
        elif drawn < SHRUNK + ENLARGED:
            factor = 1 / log_uniform(ENLARGED_BY, generator)
        if factor != 1:
            size = tuple(round(length / factor) for length in sharp.shape[1:])
            sharp = resize(sharp, size, "nearest" if factor > 1 and chance(generator) < ALIASED else "bicubic")
        window = random_window(sharp.shape[1:], self.version_size, generator)
        sharp = vary_photo(sharp[(slice(None), *window)], generator)
        return random_degradation(sharp, generator, self.mixture)

    def patch(self, k: int) -> tuple[np.ndarray, np.ndarray, Tensor, float]:
        """Blurry and sharp, (S, S, 3) uint8 each, spectra, and ``input_mse``."""
        index, generator = sample_index(k, len(self), self.seed)
        blur_version = k // len(self) // PATCHES_PER_VERSION
        if self.versions.get(index, (None,))[0] != blur_version:
            photos = self.whole(index, blur_version)
            pixels = [np.ascontiguousarray(to_pixels(photo)) for photo in photos]
            self.versions[index] = blur_version, *pixels, photo_spectra(photos[0][None])[0], mean_squared_error(*pixels)
        _, blurry, sharp, spectrum, input_mse = self.versions[index]
        window = random_window(blurry.shape[:2], self.patch_size, generator)
        dihedral = choose(range(8), generator)
        spectra = patch_spectra(blurry[patch_surroundings(window, blurry.shape[:2])], spectrum, dihedral)
        return augment(blurry[window], dihedral), augment(sharp[window], dihedral), spectra, input_mse


def find_pairs(root: Path, need_sharp: bool = True) -> list[Path]:
    """The folders of ``root`` that contain blurry.png and, if needed, sharp.png, sorted; hidden ones are skipped."""
    inside = sorted(path for path in root.iterdir() if path.name[0] != ".") if root.is_dir() else []
    folders = [path for path in inside if path.is_dir() and path.name not in SYSTEM_FOLDERS]
    if stray := [path for path in inside if path.suffix.lower() in FORMATS and path.is_file()]:
        print0(f"photos directly in {root} are left out ({len(stray)}, such as {stray[0].name}): each pair needs a folder")
    gone = [path for path in inside if not os.path.exists(path)]
    if not folders and not gone:
        raise UserError(f"{root} contains no pairs: put them there as {root}/001/blurry.png and {root}/001/sharp.png")
    names = ["blurry.png", "sharp.png"] if need_sharp else ["blurry.png"]
    advice = f"each folder needs {' and '.join(names)}"
    if need_sharp and root.name == "train":
        advice += " (train.py needs no sharp.png if DISTILL_WEIGHT = 1 and CACHE_TEACHER = True)"
    files = [folder / name for folder in folders for name in names]
    if len(folders) == 2 and not any(file.is_file() or near_name(file) for file in files):
        raise UserError(f"{root} contains folders of photos, not of pairs: prepare_data.py pairs makes these from two")
    problems = [f"{path} leads to nothing: restore what it is a link to, or remove it" for path in gone]
    raise_problems(problems + [f"{file} is missing{near_name(file)}: {advice}" for file in files if not file.is_file()])
    return folders


def near_name(file: Path) -> str:
    """Advice to rename a file like blurry.jpg or BLUR.PNG to ``file``, or "": the content is read, whatever its suffix."""
    there = {path.name.lower(): path.name for path in file.parent.iterdir() if path.is_file()}
    near = difflib.get_close_matches(file.name, there, n=1, cutoff=0.65)
    return f", rename {there[near[0]]} to {file.name}" if near else ""


def show_two_scenes(blurry: np.ndarray, sharp: np.ndarray) -> bool:
    """Whether means of 16x16 pixels, which blur hardly changes, do not correlate; both (H, W, 3) uint8."""
    means = [np.asarray(Image.fromarray(half).convert("L").reduce(16), float).ravel() for half in (blurry, sharp)]
    # Flatter than 6 gray levels, noise may be all there is. Else blur, noise and JPEG leave a correlation of 0.5 or more
    return min(map(np.std, means)) > 6 and np.corrcoef(means)[0, 1] < 0.3


def shift_between(blurry: np.ndarray, sharp: np.ndarray) -> tuple[int, int] | None:
    """Rows and columns by which ``blurry`` must be moved to fit ``sharp``, both (H, W, 3) uint8.

    From the peak of their cross-correlation, if the squared error falls by 30% or more when it is moved. None if that is
    below 2 pixels or above a quarter of the shorter side, and for a flat photo or one of less than 64 pixels.
    """
    from skimage.registration import phase_cross_correlation  # takes a while to import

    top, left = (max(0, length // 2 - 256) for length in sharp.shape[:2])
    middle = slice(top, top + 512), slice(left, left + 512)
    blurry, sharp = (np.asarray(Image.fromarray(half[middle]).convert("L"), np.float32) for half in (blurry, sharp))
    if min(sharp.shape) < 64 or min(blurry.std(), sharp.std()) < 6:  # gray levels
        return None
    blurry, sharp = ((gray - gray.mean()) / gray.std() for gray in (blurry, sharp))
    window = np.hanning(len(blurry))[:, None] * np.hanning(blurry.shape[1])
    shift, *_ = phase_cross_correlation(window * sharp, window * blurry, normalization=None)
    rows, columns = map(int, shift)
    if not 2 <= max(abs(rows), abs(columns)) <= min(blurry.shape) / 4:
        return None
    inside = tuple(slice(abs(step), length - abs(step)) for step, length in zip((rows, columns), blurry.shape, strict=True))
    moved = np.roll(blurry, (rows, columns), (0, 1))
    error, error_moved = (np.square(sharp - each)[inside].mean() for each in (blurry, moved))
    return (rows, columns) if error_moved < 0.7 * error else None


def small_photos(paths: list[Path], shapes: list[tuple[int, int]], patch_size: int | None) -> list[str]:
    """A sentence for each photo that is smaller than the patch."""
    return [
        f"{path}: {width}x{height} is smaller than the patch of {patch_size}: lower PATCH_SIZE or remove it"
        for path, (height, width) in zip(paths, shapes, strict=True)
        if min(height, width) < (patch_size or 0)
    ]


# Patches


def sample_index(k: int, photos: int, seed: int) -> tuple[int, torch.Generator]:
    """The photo of patch k, and the generator for everything else about that patch."""
    pass_number, position = divmod(k, photos)
    return shuffled_pass(photos, seed, pass_number)[position], make_generator(seed, PATCH, k)


@lru_cache(maxsize=4)  # asked for once per patch
def shuffled_pass(photos: int, seed: int, pass_number: int) -> list[int]:
    return torch.randperm(photos, generator=make_generator(seed, ORDER, pass_number)).tolist()


def random_window(shape: tuple[int, int], size: int, generator: torch.Generator) -> tuple[slice, slice]:
    """Rows and columns of a random square of ``size`` pixels in a photo of (H, W), or all of them if it is smaller."""
    top, left = (int(torch.randint(max(1, length - size + 1), (), generator=generator)) for length in shape)
    return slice(top, top + size), slice(left, left + size)


def patch_surroundings(window: tuple[slice, slice], shape: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns around a patch whose spectrum tells its blur."""
    return surroundings(tuple((part.start + part.stop) // 2 for part in window), shape)


def patch_spectra(region: np.ndarray, whole: Tensor, dihedral: int) -> Tensor:
    """(9, 64, 33): ``log_power_spectrum`` of a patch's surroundings, (H, W, 3) uint8, and ``whole``, ``photo_spectra`` of
    its photo, as they are after ``augment``."""
    return transform_spectrum(torch.cat([log_power_spectrum(to_tensor(region)[None])[0], whole]), dihedral)


def augment(patch: np.ndarray, dihedral: int) -> np.ndarray:
    """Rotate a (S, S, 3) uint8 patch by ``dihedral`` quarter turns, from 4 on after a horizontal flip."""
    patch = patch.view("V3")  # one item of three bytes per pixel: three times faster to rotate
    return np.ascontiguousarray(np.rot90(patch[:, ::-1] if dihedral >= 4 else patch, dihedral)).view(np.uint8)


def mean_squared_error(blurry: np.ndarray, sharp: np.ndarray) -> float:
    """Of two (H, W, 3) uint8 images, in units of the range [0, 1]."""
    return float(np.square(np.subtract(blurry, sharp, dtype=np.float32)).mean()) / 255**2
