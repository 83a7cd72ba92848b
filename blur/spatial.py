"""Blur that differs from place to place: depth, curved fields of focus, moving objects, camera shake.

A photo is one (3, H, W) RGB tensor, float in [0, 1]; randomness comes from a ``torch.Generator`` alone.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from blur.filters import convolve, disk_kernel, gaussian_kernel, line_kernel, linear_to_srgb, shake_kernel, srgb_to_linear
from utils import chance, choose, log_uniform, uniform


def layered_focus(photo: Tensor, generator: torch.Generator) -> Tensor:
    """Two or three layers, each with its own defocus or motion; one of them is mostly in focus."""
    defocus = focus_kernel(generator)
    result = photo if chance(generator) < 0.75 else convolve(photo, defocus(log_uniform((0.6, 2.0), generator)))
    for _ in range(1 + (chance(generator) < 0.3)):
        kernel = defocus(log_uniform((0.8, 5.5), generator)) if chance(generator) < 0.8 else motion_kernel(2, 15, generator)
        mask = random_mask(photo, uniform((0.12, 0.75), generator), generator)
        if chance(generator) < 0.3:  # a blurred object in front covers the rest with its own soft border
            result = convolve(mask * photo, kernel) + (1 - convolve(mask, kernel)) * result
        else:
            result = (1 - mask) * result + mask * convolve(photo, kernel)
    return result


def graded_focus(photo: Tensor, generator: torch.Generator) -> Tensor:
    """A radius that grows over the photo: a tilted plane, a curved field of focus, or hills."""
    x, y = coordinates(photo)
    kind = choose(("plane", "radial", "hills"), generator)
    if kind == "plane":
        angle = uniform((0, 2 * math.pi), generator)
        depth = (x * math.cos(angle) + y * math.sin(angle) - uniform((-0.8, 0.8), generator)).abs()
    elif kind == "radial":
        depth = (x - uniform((-0.4, 0.4), generator)).hypot(y - uniform((-0.4, 0.4), generator))
    else:
        depth = smooth_field(photo, generator).abs()
    strongest, defocus, steps = log_uniform((1.2, 5.5), generator), focus_kernel(generator), 4
    place = steps * depth / depth.max().clamp(min=1e-6)
    result = torch.zeros_like(photo)
    for k in range(steps + 1):  # between two radii the photo is a blend of both
        part = convolve(photo, defocus(strongest * k / steps)) if k else photo
        result = result + (1 - (place - k).abs()).clamp(min=0) * part
    return result


def moving_object(photo: Tensor, generator: torch.Generator) -> Tensor:
    """One object moves in front of a still background, or the camera follows it."""
    kernel = motion_kernel(3, 26, generator)
    mask = random_mask(photo, uniform((0.08, 0.5), generator), generator)
    if chance(generator) < 0.25:
        return mask * photo + (1 - mask) * convolve(photo, kernel)
    return convolve(mask * photo, kernel) + (1 - convolve(mask, kernel)) * photo


def camera_shake(photo: Tensor, generator: torch.Generator) -> Tensor:
    """The mean, in linear light, of views along the path of a hand that shifts and rolls.

    Source: Whyte et al. 2012, doi:10.1007/s11263-011-0502-7, section 2 (blur as a mean over camera poses).
    """
    height, width = photo.shape[-2:]
    shift, corner = log_uniform((1, 12), generator), log_uniform((0.5, 14), generator)  # pixels, of path and of roll
    views = max(9, min(25, 2 * math.ceil(max(shift, corner)) + 1))
    time, frequency = torch.linspace(-1, 1, views), torch.arange(1, 4)[:, None, None]
    phase = torch.rand(3, 3, 1, generator=generator) * 2 * math.pi
    waves = torch.randn(3, 3, 1, generator=generator) / frequency * torch.cos(math.pi * frequency * time / 2 + phase)
    path = waves.sum(0)
    path = path / (path.amax(1, keepdim=True) - path.amin(1, keepdim=True)).clamp(min=1e-6)
    path = path - path.mean(1, keepdim=True)  # the sharp photo is the view from the mean pose
    roll, down = path[0] * corner / math.hypot(height, width) * 2, path[1] * shift
    right = path[2] * shift * uniform((0.3, 1), generator)
    light, total = srgb_to_linear(photo)[None], torch.zeros(1, *photo.shape)
    rows, columns = torch.arange(height) - (height - 1) / 2, torch.arange(width) - (width - 1) / 2
    for angle, dy, dx in zip(roll.tolist(), down.tolist(), right.tolist(), strict=True):
        y = math.cos(angle) * rows[:, None] - math.sin(angle) * columns + dy
        x = math.sin(angle) * rows[:, None] + math.cos(angle) * columns + dx
        grid = torch.stack([2 * x / max(1, width - 1), 2 * y / max(1, height - 1)], -1)[None]
        total += F.grid_sample(light, grid, padding_mode="reflection", align_corners=True)
    return linear_to_srgb((total / views)[0].clamp(0, 1))


def random_mask(photo: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """(1, H, W) in [0, 1]: an object or a layer that covers about ``share`` of the photo, with a soft border.

    Its shape is a smooth blob, an ellipse, or follows the photo's colors: pixels near a random one in place and color, as in
    SLIC, Achanta et al. 2012, doi:10.1109/TPAMI.2012.120, section 3.2.
    """
    kind = choose(("blob", "blob", "ellipse", "color", "color"), generator)
    if kind == "blob":
        value = smooth_field(photo, generator)
    else:
        x, y = coordinates(photo)
        x0, y0 = uniform((-0.7, 0.7), generator), uniform((-0.7, 0.7), generator)
        angle, stretch = uniform((0, math.pi), generator), log_uniform((0.4, 2.5), generator)
        u = (x - x0) * math.cos(angle) + (y - y0) * math.sin(angle)
        v = (y - y0) * math.cos(angle) - (x - x0) * math.sin(angle)
        value = -(u.square() * stretch + v.square() / stretch)
        if kind == "color":
            soft = F.avg_pool2d(photo[None], 5, 1, 2, count_include_pad=False)[0]
            height, width = photo.shape[-2:]
            center = soft[:, min(height - 1, int((y0 + 1) / 2 * height)), min(width - 1, int((x0 + 1) / 2 * width))]
            value = value - uniform((4, 30), generator) * (soft - center[:, None, None]).square().sum(0)
    sample = value.flatten()[torch.randperm(value.numel(), generator=generator)[:2000]]
    mask = (value > sample.quantile(1 - share)).float()[None]
    return convolve(mask, gaussian_kernel(log_uniform((0.4, 3.0), generator))).clamp(0, 1)


def smooth_field(photo: Tensor, generator: torch.Generator) -> Tensor:
    """(H, W) smooth random values around 0, with two to six hills along the shorter side."""
    height, width = photo.shape[-2:]
    cells = 4 + int(torch.randint(4, (), generator=generator))
    coarse = torch.randn(1, 1, cells, max(3, round(cells * width / height)), generator=generator)
    return F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)[0, 0]


def coordinates(photo: Tensor) -> tuple[Tensor, Tensor]:
    """x and y of each pixel, (H, W) each, from -1 to 1."""
    y, x = (torch.linspace(-1, 1, length) for length in photo.shape[-2:])
    return x.expand(len(y), -1), y[:, None].expand(-1, len(x))


def focus_kernel(generator: torch.Generator):
    """A function from a radius in pixels to a kernel: a disk, or a Gaussian that looks about as blurry."""
    return disk_kernel if chance(generator) < 0.7 else lambda radius: gaussian_kernel(0.5 * radius)


def motion_kernel(shortest: float, longest: float, generator: torch.Generator) -> Tensor:
    length = log_uniform((shortest, longest), generator)
    if chance(generator) < 0.7:
        return line_kernel(length, uniform((0, math.pi), generator))
    return shake_kernel(length, generator)
