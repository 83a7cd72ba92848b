"""Blur kernels, and the convolution of photos of any size with them."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils import uniform


def convolve(photo: Tensor, kernel: Tensor) -> Tensor:
    """Convolve (C, H, W) with a (k, k) kernel, or (N, C, H, W) with (N, 1, k, k); borders are reflected.

    By FFT: its cost hardly grows with k.
    """
    return convolve_valid(reflect_pad(photo, kernel.shape[-1] // 2), kernel)


def convolve_valid(photo: Tensor, kernel: Tensor) -> Tensor:
    """As ``convolve``, only where the kernel fits: (..., H, W) -> (..., H - k + 1, W - k + 1)."""
    (height, width), margin = photo.shape[-2:], kernel.shape[-1] - 1
    size = [-(-length // 16) * 16 for length in (height, width)]  # an FFT of a size with large prime factors is slow
    spectrum = torch.fft.rfft2(photo, s=size) * torch.fft.rfft2(kernel.to(photo), s=size)
    return torch.fft.irfft2(spectrum, s=size)[..., margin:height, margin:width]


def reflect_pad(photo: Tensor, margin: int) -> Tensor:
    """(..., H, W) with ``margin`` more pixels on each side, reflected as by ``reflect_indices``."""
    rows, columns = (reflect_indices(length, margin).to(photo.device) for length in photo.shape[-2:])
    return photo[..., rows, :][..., columns]


def reflect_indices(size: int, margin: int) -> Tensor:
    """Indices of ``size`` pixels and ``margin`` more at both ends, reflected about the outermost pixels.

    Unlike torch's padding it takes any margin: for a wide kernel a narrow photo is reflected again and again.
    """
    return torch.from_numpy(np.pad(np.arange(size), margin, mode="reflect"))


def convolve_linear_light(photo: Tensor, kernel: Tensor) -> Tensor:
    """As ``convolve``, but on linear light instead of sRGB values: bright points spread as they do in a lens."""
    return linear_to_srgb(convolve(srgb_to_linear(photo), kernel))


def srgb_to_linear(photo: Tensor) -> Tensor:
    """sRGB values in [0, 1] to linear light in [0, 1]. Source: IEC 61966-2-1."""
    return torch.where(photo <= 0.04045, photo / 12.92, ((photo.clamp(min=0) + 0.055) / 1.055) ** 2.4)


def linear_to_srgb(light: Tensor) -> Tensor:
    """Linear light in [0, 1] to sRGB values in [0, 1]. Source: IEC 61966-2-1."""
    light = light.clamp(min=0)
    return torch.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


# Kernels: (k, k) float32 with odd k, non-negative, of sum 1, centered


def gaussian_kernel(sigma: float, sigma_y: float | None = None, angle: float = 0.0) -> Tensor:
    """Gaussian of ``sigma`` pixels along ``angle`` (radians) and ``sigma_y`` across it; isotropic if None."""
    sigma_y = sigma if sigma_y is None else sigma_y
    half = math.ceil(4 * max(sigma, sigma_y))
    x = torch.arange(-half, half + 1, dtype=torch.float32)
    y = x[:, None]
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    kernel = torch.exp(-0.5 * ((along / sigma) ** 2 + (across / sigma_y) ** 2))
    return kernel / kernel.sum()


def disk_kernel(radius: float) -> Tensor:
    """Defocus: a uniform disk of ``radius`` pixels; border pixels count by the area the disk covers."""
    half = math.ceil(radius + 0.5)
    fine = 8  # sampling points per pixel and axis
    points = (torch.arange((2 * half + 1) * fine) + 0.5) / fine - half - 0.5
    inside = (points[:, None] ** 2 + points**2 <= radius**2).float()
    kernel = F.avg_pool2d(inside[None], fine)[0]
    kernel[half, half] += 1e-6  # a radius below the sampling step is no blur, not a division by zero
    return kernel / kernel.sum()


def line_kernel(length: float, angle: float) -> Tensor:
    """Straight uniform motion over ``length`` pixels at ``angle`` radians from the x axis."""
    position = torch.linspace(-length / 2, length / 2, 2 * math.ceil(length) + 9)
    return path_kernel(position * math.cos(angle), position * math.sin(angle))


def shake_kernel(length: float, generator: torch.Generator) -> Tensor:
    """Camera shake: a random path of ``length`` pixels that drifts, turns and changes its speed.

    A random walk with inertia, after Boracchi and Foi 2012, doi:10.1109/TIP.2012.2192126, section IV.
    """
    steps = 64 + 2 * math.ceil(length)
    curl = uniform((0.02, 0.35), generator)  # radians per step: from nearly straight to curled up
    turns = torch.randn(steps, generator=generator) * curl
    jerks = torch.rand(steps, generator=generator) < 1.5 / steps  # one or two sudden changes of direction
    turns = torch.where(jerks, torch.randn(steps, generator=generator) * 1.5, turns)
    heading = uniform((0, 2 * math.pi), generator) + turns.cumsum(0)
    speed = (torch.randn(steps, generator=generator) * 0.15).cumsum(0).exp()  # slow stretches weigh more
    speed = speed * (length / speed.sum())
    return path_kernel((speed * heading.cos()).cumsum(0), (speed * heading.sin()).cumsum(0))


def path_kernel(x: Tensor, y: Tensor) -> Tensor:
    """The blur of a point that spends an equal time at each of the places ``x[i], y[i]`` (pixels, (n,) each)."""
    x, y = x - x.mean(), y - y.mean()
    half = math.ceil(float(torch.maximum(x.abs().max(), y.abs().max()))) + 1
    kernel = torch.zeros(2 * half + 1, 2 * half + 1)
    left, top = x.floor(), y.floor()
    for column, weight_x in ((left, left + 1 - x), (left + 1, x - left)):
        for row, weight_y in ((top, top + 1 - y), (top + 1, y - top)):
            where = (row.long() + half, column.long() + half)
            kernel.index_put_(where, weight_x * weight_y, accumulate=True)  # bilinear: keeps the center of mass
    return kernel / kernel.sum()
