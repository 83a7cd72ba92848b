"""Power spectra of photos."""

import math

from functools import reduce

import torch

import torch.nn.functional as F

from torch import Tensor, nn

from degradations import convolve, reflect_indices

from layers import zero_init

WINDOW = 64  # pixels: rows and columns of the windows whose spectra are averaged

@torch.no_grad()
def log_power_spectrum(photo: Tensor, peak: float = 1.0, most: int = 144) -> Tensor:
    """The spectrum of whole photos' brightness: (N, C, H, W) from 0 to ``peak`` -> (N, 2, 64, 33).

    The logarithms of the mean power and the means of the logarithms of the power in windows of 64x64 pixels, which
    differ where few edges hold most of the power. Rows are the vertical frequencies from -32 to 31 periods in 64
    pixels, columns the horizontal ones from 0 to 32; the other half would be the mirror image.

    Args:
        most: windows that are taken at the most, spread evenly over the photo; half as many of a large one, where
            they do not overlap and tell as much.
    Source: Welch 1967, doi:10.1109/TAU.1967.1161901, with a Hann window.
    """
    with torch.autocast(photo.device.type, enabled=False):
        parts = windows(photo, peak, most)
        found = log_means(power(spectrum(parts)))
        # A photo of a few rows or windows does not tell how blurry it is
        trust = min((min(photo.shape[-2:]) - 16) / (WINDOW - 16), (parts.shape[1] - 1) / 24)
        return found if trust >= 1 else typical_spectrum(found).lerp(found, max(0.0, trust))

def typical_spectrum(like: Tensor) -> Tensor:
    """About what ``describe`` says of a sharp photo: power falls with the cube of the frequency. Fitted to 30 photos."""
    rows, columns = (torch.arange(count, device=like.device, dtype=like.dtype) for count in like.shape[-2:])
    fall = -3 * (rows[:, None] - WINDOW // 2).hypot(columns).clamp(min=1).log()
    return torch.stack([fall + 3.0, fall + 1.2]).expand_as(like)

def power(found: Tensor) -> Tensor:
    """The squares of the absolute values of complex numbers."""
    return found.real.square().addcmul_(found.imag, found.imag)  # abs().square() takes three times longer

def log_means(power: Tensor) -> Tensor:
    """What ``describe`` says of photos whose windows have that ``power``, (N, n, 64, 33) -> (N, 2, 64, 33)."""
    found = (power.mean(1) + 1e-7).log(), (power + 1e-7).log().mean(1)
    return torch.stack(found, 1).roll(WINDOW // 2, 2)

def windows(photo: Tensor, peak: float = 1.0, most: int = 144) -> Tensor:
    """The brightness of windows spread evenly over whole photos: (N, C, H, W) -> (N, n, 64, 64), n <= ``most``."""
    height, width = photo.shape[-2:]
    if min(height, width) < WINDOW:
        photo = photo.to(torch.promote_types(photo.dtype, torch.float32))  # 16-bit numbers cannot be indexed
        rows, columns = (reflect_indices(length, max(0, WINDOW - length)).to(photo.device) for length in (height, width))
        photo = photo[..., rows, :][..., columns]
        height, width = photo.shape[-2:]
    counts = [math.ceil((length - WINDOW) / (WINDOW // 2)) + 1 for length in (height, width)]
    if math.prod(counts) > 2 * most:  # then they lie side by side, and each tells about twice as much
        most = max(1, most // 2)
    share = min(1.0, (most / math.prod(counts)) ** 0.5)
    short = math.ceil(min(counts) * share)  # first along the shorter side, where one more or less is a lot
    numbers = sorted((short, min(max(counts), most // short)), reverse=counts[0] > counts[1])
    tops, lefts = (
        torch.linspace(0, length - WINDOW, number).long().tolist()
        for length, number in zip((height, width), numbers, strict=True)
    )
    photo = photo.movedim(1, -1)  # as pictures are in memory, so that rows are copied whole
    rows = torch.cat([photo[:, top : top + WINDOW] for top in tops], 1)
    found = torch.stack([rows[:, :, left : left + WINDOW] for left in lefts], 1)
    colours = found.to(torch.promote_types(found.dtype, torch.float32)).unbind(-1)
    mean = reduce(torch.add, colours) / (len(colours) * peak)  # mean(-1) takes four times longer
    return mean.view(len(photo), -1, WINDOW, WINDOW)

def spectrum(squares: Tensor) -> Tensor:
    """(..., 64, 64) -> complex (..., 64, 33), without the mean; the mean of its squares is the variance times 64 x 64."""
    hann = torch.hann_window(WINDOW, device=squares.device, dtype=squares.dtype)
    hann = hann[:, None] * hann
    squares = squares - squares.mean((-2, -1), keepdim=True)
    return torch.fft.rfft2(squares * (hann / hann.square().mean().sqrt()), norm="ortho")

def transform_spectrum(found: Tensor, turn: int) -> Tensor:
    """(..., 64, 33) of a photo as it is when the photo is turned, ``turn`` 0 to 7 as in ``patches.cut``."""
    turned = turn % 2 == 1
    if (turn >= 4) != turned:  # mirrored; a quarter turn is a transposition of the mirror image
        found = found.flip(-2).roll(1, -2)  # rows are -32 to 31, and -32 is its own mirror image
    if turned:
        left = torch.cat([found[..., :1, 1:-1].flip(-1), found[..., 1:, 1:-1].flip(-1, -2)], -2)  # the half that is left out
        found = torch.cat([found[..., -1:], left, found[..., :-1]], -1).transpose(-1, -2)  # all columns from -32 to 31
        found = torch.cat([found[..., WINDOW // 2 :], found[..., :1]], -1)
    return found
