"""How noisy a photo is, measured where photos hold little detail: in the chroma of their smoothest places."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from blur.spectrum import WINDOW, color_windows, log_power_spectrum

NOISE_FEATURES = 3  # numbers that tell the noise of a photo
FLOOR = 2e-4  # added to each standard deviation: 0.05 gray levels


@torch.no_grad()
def photo_spectra(photo: Tensor, peak: float = 1.0) -> Tensor:
    """All that is measured of whole photos, (N, C, H, W) in [0, ``peak``]: (N, 7, 64, 33).

    Channels 0 to 3 are ``log_power_spectrum`` of the blurriest windows and of the whole photo, 4 to 6 ``chroma_noise``, the
    same at all frequencies: so it is stored, flipped and passed on with the spectra.
    """
    windows = color_windows(photo)
    spectra = log_power_spectrum(photo, peak, with_blurriest=True, windows=windows)
    return with_noise(spectra, chroma_noise(windows, peak))


def with_noise(spectra: Tensor, noise: Tensor) -> Tensor:
    """(N, 4, 64, 33) and (N, 3) as ``photo_spectra``."""
    return torch.cat([spectra, noise[..., None, None].expand(-1, -1, WINDOW, WINDOW // 2 + 1)], 1)


def chroma_noise(windows: Tensor, peak: float = 1.0) -> Tensor:
    """Noise of the chroma of photos with these ``color_windows``, (N, n, 64, 64, C) in [0, ``peak``]: (N, 3).

    Logarithms of standard deviations: the 0.1, 0.25 and 0.5 quantiles over cells of 16x16 pixels, since noise is in all of
    them, detail in few. Gray photos have no chroma, and the result is that of no noise, whatever theirs is.
    Source: smoothest blocks as in Olsen 1993, doi:10.1006/cgip.1993.1022.
    """
    middle = windows.shape[-1] // 2  # green, or gray
    colors = [windows[..., i].to(torch.promote_types(windows.dtype, torch.float32)) / peak for i in (0, middle, -1)]
    block = functools.partial(F.avg_pool2d, kernel_size=4)  # in 4x4 pixels color hardly changes
    variances = block(squared_differences(*colors)) - squared_differences(*map(block, colors))
    cells = (F.avg_pool2d(variances, 4) / 9).flatten(1).sort(1).values  # 9: each channel less the mean of all
    count = cells.shape[1]
    quantiles = torch.stack([cells[:, count // 10], cells[:, count // 4], cells[:, count // 2]], 1)
    return (quantiles.clamp(min=0).sqrt() + FLOOR).log()


def squared_differences(red: Tensor, green: Tensor, blue: Tensor) -> Tensor:
    """Three times the sum of the squares of each color less the mean of all."""
    return (red - green).square() + (green - blue).square() + (blue - red).square()


def normalize_noise(noise: Tensor) -> Tensor:
    """``chroma_noise`` as an input of layers, about -1 to 1."""
    return noise / 2 + 3
