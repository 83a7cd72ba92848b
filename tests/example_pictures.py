"""Pixels and pictures for the tests of image files."""

import numpy as np

from images.pictures import Picture


def values(channels, dtype, height=21, width=34):
    rng = np.random.default_rng(channels)
    smooth = np.add.outer(np.arange(height), np.arange(width))[..., None] * rng.uniform(1, 3, channels) * 1.01
    scale = np.iinfo(dtype).max / 255
    return (smooth * scale + rng.integers(0, 5, smooth.shape)).clip(0, np.iinfo(dtype).max).astype(dtype)


def picture_of(channels, dtype):
    all_values = values(channels, dtype)
    colours = channels - (channels % 2 == 0)
    return Picture(all_values[..., :colours], all_values[..., colours:] if colours < channels else None)


def same(a, b):
    alphas = (a.alpha is None) == (b.alpha is None) and (a.alpha is None or np.array_equal(a.alpha, b.alpha))
    return a.pixels.dtype == b.pixels.dtype and np.array_equal(a.pixels, b.pixels) and alphas
