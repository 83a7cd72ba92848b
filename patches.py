"""Which patch is item k of a training, how it is cut, and how pixels become tensors and tensors pixels."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


def generator_of(*numbers: int) -> torch.Generator:
    """A stream of chance of its own for each tuple, of one length, of whole numbers >= 0."""
    state = np.random.SeedSequence(numbers).generate_state(1)[0]  # torch itself would use the low 32 bits of a seed only
    return torch.Generator().manual_seed(int(state))


def draw_photo(k: int, photos: int, seed: int) -> tuple[int, torch.Generator]:
    """Photo of item k of an endless training, and the generator for all that is drawn after it."""
    lap, position = divmod(k, photos)
    return lap_order(photos, seed, lap)[position], generator_of(seed, 1, k)


@lru_cache(maxsize=4)  # a lap is asked for once per photo
def lap_order(photos: int, seed: int, lap: int) -> list[int]:
    return torch.randperm(photos, generator=generator_of(seed, 0, lap)).tolist()


def random_window(shape: tuple[int, int], size: int, generator: torch.Generator) -> tuple[slice, slice]:
    """Rows and columns of a random square of ``size`` pixels in a photo of (H, W)."""
    top, left = (int(torch.randint(length - size + 1, (), generator=generator)) for length in shape)
    return slice(top, top + size), slice(left, left + size)


def cut(photos: Sequence, index: int, window: tuple[slice, slice], turn: int) -> np.ndarray | Tensor:
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
