"""Sharp photos, blurred on the fly -> training patches and validation photos."""

import zlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dataset import too_small
from degradations import Mixture, chance, random_degradation, shrink
from gauge import describe, turned_spectrum
from patches import as_batch, cut, draw_photo, generator_of, random_window, to_pixels, to_tensor
from photos import DecodedPhotos, list_problems
from utils import UserError

# Photos of one source are about equally crisp; a network that has seen no others takes a crisper one for blurry and
# overdoes it. A photo that is shrunk is crisper than before
SHRUNK = 0.5  # share of the blurry photos that are made of photos shrunk by a factor of 1 to 2
LAPS = 8  # patches that are cut from a photo before it is blurred anew: a whole photo's blur takes as long as ten patches


class BlurredPhotos(Dataset):
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
        blurry, sharp, descriptions = [], [], []
        for k in items:
            index, generator = draw_photo(k, len(self), self.seed)
            photos, description = self._version(index, k // len(self) // LAPS)
            window = random_window(photos[0].shape[:2], self.patch_size, generator)
            turn = int(torch.randint(8, (), generator=generator))
            blurry.append(cut(photos, 0, window, turn))
            sharp.append(cut(photos, 1, window, turn))
            descriptions.append(turned_spectrum(description, turn))
        return [as_batch(blurry), as_batch(sharp), torch.stack(descriptions)]

    def _version(self, index: int, draw: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Blurry and sharp, (H, W, 3) bytes, and the description of version ``draw``; kept until the next is asked for."""
        if self.blurred.get(index, (None,))[0] != draw:
            blurry, sharp = self.whole(index, draw)
            pixels = tuple(torch.from_numpy(to_pixels(photo)) for photo in (blurry, sharp))
            self.blurred[index] = draw, pixels, describe(blurry[None])[0]
        return self.blurred[index][1:]
