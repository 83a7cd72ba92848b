"""Power spectra of photos: what shows how blurry a photo is."""

import math
from functools import reduce

import torch
from torch import Tensor

from blur.filters import reflect_indices

WINDOW = 64  # rows and columns, in pixels, of the windows whose spectra are averaged
MAX_WINDOWS = 144


@torch.no_grad()
def log_power_spectrum(
    photo: Tensor, peak: float = 1.0, with_blurriest: bool = False, windows: Tensor | None = None
) -> Tensor:
    """Log power spectrum of whole photos, averaged over windows: (N, C, H, W) in [0, ``peak``] -> (N, 2, 64, 33).

    Channel 0 is the log of the mean power over all windows, channel 1 the mean of the logs; they differ where a few edges
    hold most of the power. Rows are vertical frequencies from -32 to 31 periods in 64 pixels, columns horizontal ones
    from 0 to 32; the other half is redundant.

    Args:
        with_blurriest: the same of the blurriest windows (``blurriest_windows``), too: (N, 4, 64, 33), these first. They
            show a blur that is in a part of the photo.
        windows: ``color_windows`` of the photo, if they are known already.
    Source: Welch 1967, doi:10.1109/TAU.1967.1161901, with a Hann window.
    """
    with torch.autocast(photo.device.type, enabled=False):
        windows = gray_mean(color_windows(photo) if windows is None else windows, peak)
        # A photo of a few rows or windows does not show how blurry it is
        trust = min((min(photo.shape[-2:]) - 16) / (WINDOW - 16), (windows.shape[1] - 1) / 24)
        return average_spectrum(windows, min(1.0, max(0.0, trust)), with_blurriest)


def average_spectrum(windows: Tensor, trust: float | Tensor, with_blurriest: bool) -> Tensor:
    """``log_power_spectrum`` of photos with these windows, (N, n, 64, 64).

    Args:
        trust: 0 to 1, the share of their spectrum; the rest is ``typical_spectrum``.
    """
    windows = power(windowed_fft(windows))
    parts = [windows]
    if with_blurriest:
        blurriest = blurriest_windows(windows)[..., None, None].expand(-1, -1, *windows.shape[2:])
        parts.insert(0, windows.gather(1, blurriest))  # torch.export cannot take_along_dim of any number of windows
    spectrum = torch.cat([log_means(part) for part in parts], 1)
    return typical_spectrum(spectrum[:, :2]).repeat(1, len(parts), 1, 1).lerp(spectrum, trust)


def blurriest_windows(powers: Tensor) -> Tensor:
    """Numbers of the twelfth of the windows (N, n, 64, 33) whose high frequencies have the least power relative to low ones.

    In any one of four directions, since motion takes away the high frequencies of one alone. Only of the two thirds with
    the most power at low frequencies: the others hold no texture that could be blurry.
    """
    count = powers.shape[1]
    rows = torch.arange(-32, 32, device=powers.device).roll(32)[:, None]
    columns = torch.arange(33, device=powers.device)
    radius = (rows**2 + columns**2).sqrt()  # periods in 64 pixels
    tangent = math.sqrt(2) - 1  # of 22.5 degrees
    horizontal, vertical = rows.abs() <= tangent * columns, columns <= tangent * rows.abs()
    diagonal = ~(horizontal | vertical)
    directions = [horizontal, vertical, diagonal & (rows > 0), diagonal & (rows < 0)]
    low, high = (
        torch.stack([powers[..., (radius >= first) & (radius < last) & each].sum(-1) for each in directions])
        for first, last in ((2, 6), (8, 20))
    )  # (4, N, n)
    textured = low.sum(0).topk(math.ceil(count * 2 / 3), 1).indices
    ratio = ((high + 1e-7) / (low + 1e-7)).amin(0).gather(1, textured)
    return textured.gather(1, ratio.topk(math.ceil(count / 12), 1, largest=False).indices)


def nll(powers: Tensor, model: Tensor) -> Tensor:
    """Negative log-likelihood per frequency of ``powers`` where ``model`` is expected, at the best scale of the model.

    Frequencies are the last axis. Source: the likelihood of a power spectrum, Whittle 1953, doi:10.1007/BF02590998.
    """
    return (powers / model).mean(-1).log() + model.log().mean(-1)


def typical_spectrum(like: Tensor) -> Tensor:
    """Roughly the ``log_power_spectrum`` of a sharp photo: power falls with frequency cubed. Fitted to 30 photos."""
    rows, columns = (torch.arange(count, device=like.device, dtype=like.dtype) for count in like.shape[-2:])
    decay = -1.5 * ((rows[:, None] - WINDOW // 2) ** 2 + columns**2).clamp(min=1).log()
    return torch.stack([decay + 3.0, decay + 1.2]).expand_as(like)


def power(spectrum: Tensor) -> Tensor:
    """Squared magnitude of complex numbers."""
    return spectrum.real.square().addcmul_(spectrum.imag, spectrum.imag)  # abs().square() takes three times longer


def log_means(powers: Tensor) -> Tensor:
    """``log_power_spectrum`` of photos whose windows have these ``powers``: (N, n, 64, 33) -> (N, 2, 64, 33)."""
    logs = (powers.mean(1) + 1e-7).log(), (powers + 1e-7).log().mean(1)
    return torch.stack(logs, 1).roll(WINDOW // 2, 2)


def gray_mean(windows: Tensor, peak: float = 1.0) -> Tensor:
    """(..., C) in [0, ``peak``], any type -> (...) in [0, 1]."""
    channels = windows.to(torch.promote_types(windows.dtype, torch.float32)).unbind(-1)
    return reduce(torch.add, channels) / (len(channels) * peak)  # mean(-1) takes four times longer


def color_windows(photo: Tensor) -> Tensor:
    """Windows spread evenly over whole photos: (N, C, H, W) -> (N, n, 64, 64, C), n <= MAX_WINDOWS.

    In a large photo, where they do not overlap and are about as informative, half as many.
    """
    height, width = photo.shape[-2:]
    if min(height, width) < WINDOW:
        photo = photo.to(torch.promote_types(photo.dtype, torch.float32))  # torch cannot index uint16
        rows, columns = (reflect_indices(length, max(0, WINDOW - length)).to(photo.device) for length in (height, width))
        photo = photo[..., rows, :][..., columns]
        height, width = photo.shape[-2:]
    counts = [math.ceil((length - WINDOW) / (WINDOW // 2)) + 1 for length in (height, width)]
    max_windows = MAX_WINDOWS if math.prod(counts) <= 2 * MAX_WINDOWS else MAX_WINDOWS // 2
    share = min(1.0, (max_windows / math.prod(counts)) ** 0.5)
    short = math.ceil(min(counts) * share)  # the shorter side first, where rounding matters most
    numbers = sorted((short, min(max(counts), max_windows // short)), reverse=counts[0] > counts[1])
    tops, lefts = (
        torch.linspace(0, length - WINDOW, number).long().tolist()
        for length, number in zip((height, width), numbers, strict=True)
    )
    photo = photo.movedim(1, -1)  # channels last, so that rows are copied whole
    rows = torch.cat([photo[:, top : top + WINDOW] for top in tops], 1)
    windows = torch.stack([rows[:, :, left : left + WINDOW] for left in lefts], 1)
    return windows.view(len(photo), -1, WINDOW, WINDOW, windows.shape[-1])


def windowed_fft(windows: Tensor) -> Tensor:
    """(..., n, n) -> complex (..., n, n / 2 + 1) after a Hann window, without the mean; its power sums to n^2 x variance."""
    hann = torch.hann_window(windows.shape[-1], device=windows.device, dtype=windows.dtype)
    hann = hann[:, None] * hann
    windows = windows - windows.mean((-2, -1), keepdim=True)
    return torch.fft.rfft2(windows * (hann / hann.square().mean().sqrt()), norm="ortho")


def transform_spectrum(spectrum: Tensor, dihedral: int) -> Tensor:
    """The (..., 64, 33) spectrum of a photo that ``dataset.augment`` flips and rotates by ``dihedral``, 0 to 7."""
    rotated = dihedral % 2 == 1
    if (dihedral >= 4) != rotated:  # flipped; a quarter turn is a transposed flip
        spectrum = spectrum.flip(-2).roll(1, -2)  # rows are -32 to 31, and -32 is its own mirror image
    if rotated:
        left = torch.cat([spectrum[..., :1, 1:-1].flip(-1), spectrum[..., 1:, 1:-1].flip(-1, -2)], -2)  # the redundant half
        spectrum = torch.cat([spectrum[..., -1:], left, spectrum[..., :-1]], -1).transpose(-1, -2)  # columns -32 to 31
        spectrum = torch.cat([spectrum[..., WINDOW // 2 :], spectrum[..., :1]], -1)
    return spectrum
