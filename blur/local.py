"""Blur that differs from place to place: spectra of overlapping regions of a photo, and what is estimated from them.

A photo is divided into regions of 64 pixels. The blur at a region's center is estimated from the spectrum of the 160
pixels around it and, beside it, that of the whole photo, so that a sky or a small region is not guessed. Between centers
filters and embeddings are interpolated linearly, which leaves no seams. Parts out of focus that are smaller than that, or
of any shape, share one estimate, from the blurriest windows of the photo, and a map tells where they are.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from blur.filters import convolve_valid, reflect_indices, reflect_pad
from blur.spectrum import log_power_spectrum, nll, power, windowed_fft

CELL = 16  # pixels, of the softness map
REGION = 64  # pixels between the centers of regions
SURROUNDINGS = 160  # rows and columns, in pixels, whose spectrum tells the blur of a region


def region_centers(length: int) -> list[int]:
    """Centers of the regions along an axis of ``length`` pixels: 32, 96, ..."""
    return list(range(REGION // 2, max(length, REGION // 2 + 1), REGION))


def surroundings(center: tuple[int, int], size: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns of the square around ``center`` whose spectrum is taken, inside a photo of ``size`` (H, W)."""
    starts = [max(0, min(c - SURROUNDINGS // 2, length - SURROUNDINGS)) for c, length in zip(center, size, strict=True)]
    return tuple(slice(start, min(start + SURROUNDINGS, length)) for start, length in zip(starts, size, strict=True))


def local_spectra(photo: Tensor, whole: Tensor, peak: float = 1.0) -> Iterator[Tensor]:
    """Spectra of the regions and ``whole``, (N, 2, 64, 33): (N, C, H, W) -> for each row of regions (N, gw, 4, 64, 33).

    Channels 0 and 1 are ``log_power_spectrum`` of the region's surroundings, 2 and 3 are ``whole``, that of the photo.
    """
    size = photo.shape[-2:]
    for y in region_centers(size[0]):  # one row after another: all together would fill the memory
        regions = [photo[(..., *surroundings((y, x), size))] for x in region_centers(size[1])]
        yield torch.stack([torch.cat([log_power_spectrum(region, peak), whole], 1) for region in regions], 1)


@torch.no_grad()
def softness_map(photo: Tensor, spectra: Tensor, peak: float = 1.0) -> Tensor:
    """Where in photos (N, C, H, W) the blur of the blurriest windows is, for cells of 16 pixels: (N, H / 16, W / 16, 1).

    A log-likelihood ratio per frequency, for the 32x32 pixels around the middle of a cell: above 0 the spectrum of the
    blurriest windows explains them better than that of the whole photo. Mostly -1 to 2, and about 0 where the blur is the
    same all over.

    Args:
        spectra: the photo's ``log_power_spectrum`` with the blurriest windows, (N, 4, 64, 33).
    """
    size, margin = 2 * CELL, CELL // 2
    with torch.autocast(photo.device.type, enabled=False):
        # As windows of 32 pixels show them, (N, blurriest and whole, 32, 17)
        models = F.avg_pool2d(spectra[:, ::2].float().exp(), 3, 2, padding=1, count_include_pad=False)
        radius = torch.arange(-16.0, 16)[:, None].hypot(torch.arange(17.0))  # periods in 32 pixels
        # Neither slow gradients nor what is mostly noise
        y, x = (part.to(photo.device) for part in ((radius >= 1.5) & (radius < 13)).nonzero(as_tuple=True))
        blurriest, whole = models[:, :, None, y, x].unbind(1)  # (N, 1, frequencies)
        rows, columns = (
            reflect_indices(length, size)[size - margin : 2 * size - margin + (length - 1) // CELL * CELL]
            for length in photo.shape[-2:]
        )
        dtype = torch.promote_types(photo.dtype, torch.float32)
        lines = []
        for row in rows.unfold(0, size, CELL):  # one row of cells after another: all together would fill the memory
            first, last = int(row.min()), int(row.max())
            band = photo[..., first : last + 1, :].to(dtype).mean(1) / peak
            windows = band[:, row - first][..., columns].unfold(-1, size, CELL).movedim(-2, 1)
            powers = power(windowed_fft(windows)).roll(CELL, -2)[..., y, x] + 1e-7
            lines.append(nll(powers, whole) - nll(powers, blurriest))
        return torch.stack(lines, 1)[..., None]


class BlurMap(NamedTuple):
    """The estimated blur of photos, or of a part of them, by region."""

    kernels: Tensor  # (N, gh, gw, 32, 63), the upper_half of each region's inverse filter
    embeddings: Tensor  # (N, gh, gw, 2 * 64): of the region and of the blurriest windows
    blurriest_kernel: Tensor  # (N, 32, 63), the upper_half of that for the blurriest windows
    softness: Tensor  # (N, H / 16, W / 16, 1), where their blur is (softness_map)
    noise: Tensor  # (N, 3), chroma_noise of the whole photo
    top: int = 0  # of the part, in pixels of the whole photo
    left: int = 0

    def crop(self, rows: slice, columns: slice) -> "BlurMap":
        """The map of a part of the photo; regions and softness are those of the whole photo."""
        return self._replace(top=self.top + rows.start, left=self.left + columns.start)

    def apply_filters(self, photo: Tensor, exact: bool) -> Tensor:
        """(N, C, H, W) convolved with the interpolated filters and with ``blurriest_kernel``: (N, 2 C, H, W).

        Never under autocast, since a strong filter would amplify rounding.

        Args:
            exact: compute in float64, then round: in float32 the FFT of a tile rounds differently from that of the photo.
        """
        (gh, gw), margin = self.kernels.shape[1:3], self.kernels.shape[-1] - 1
        dtype = torch.float64 if exact and photo.device.type != "mps" else self.kernels.dtype  # mps has no float64
        with torch.autocast(photo.device.type, enabled=False):
            padded, result = reflect_pad(photo.to(dtype), margin // 2), torch.zeros_like(photo, dtype=self.kernels.dtype)
            all_columns = list(_hats(gw, self.left, photo.shape[-1]))
            for i, rows, weight_y in _hats(gh, self.top, photo.shape[-2]):
                for j, columns, weight_x in all_columns:
                    part = padded[..., rows.start : rows.stop + margin, columns.start : columns.stop + margin]
                    part = convolve_valid(part, _whole_kernel(self.kernels[:, i, j], dtype)).to(result)
                    result[..., rows, columns] += part * (weight_y[:, None] * weight_x).to(result)
            blurriest = convolve_valid(padded, _whole_kernel(self.blurriest_kernel, dtype)).to(result)
        return torch.cat([result, blurriest], 1)

    def interpolate(self, values: Tensor, height: int, width: int, step: int, cell: int = REGION) -> Tensor:
        """Values of regions, (N, gh, gw, C), for each of (height, width) squares of ``step`` pixels: (N, C, H, W).

        Args:
            cell: pixels between the centers of regions.
        Returns:
            1 in place of an H or W along which there is only one region.
        """
        for axis, (count, start) in enumerate(((height, self.top), (width, self.left)), start=1):
            regions = values.shape[axis]
            if regions == 1:
                continue
            place = (start + (torch.arange(count, device=values.device) + 0.5) * step - cell / 2) / cell
            place = place.clamp(0, regions - 1)
            low = place.floor().long().clamp(max=regions - 2)
            share = (place - low).to(values.dtype).view(-1, *[1] * (3 - axis))
            # Twice as fast as torch.lerp, which does not vectorize over a broadcast weight
            slope = values.diff(dim=axis).index_select(axis, low)
            values = values.index_select(axis, low).addcmul_(slope, share)
        return values.permute(0, 3, 1, 2)  # channels last in memory, as convolutions want it


def upper_half(kernels: Tensor) -> Tensor:
    """(N, 1, k, k) -> (N, k // 2 + 1, k), all of a filter that is symmetric about its center; half the memory."""
    return kernels[:, 0, : kernels.shape[-1] // 2 + 1].clone()


def _whole_kernel(half: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of ``upper_half``."""
    half = half[:, None].to(dtype)
    return torch.cat([half, half[..., :-1, :].flip(-1, -2)], -2)


def _hats(count: int, start: int, length: int) -> Iterator[tuple[int, slice, Tensor]]:
    """For each region that reaches into a part of an axis, from ``start`` on: its number, where, and its weights there."""
    place = (torch.arange(start, start + length) + 0.5 - REGION / 2) / REGION
    weights = 1 - (place.clamp(0, count - 1) - torch.arange(count)[:, None]).abs()
    for index, weight in enumerate(weights):
        if inside := (weight > 0).nonzero().flatten().tolist():
            part = slice(inside[0], inside[-1] + 1)
            yield index, part, weight[part]
