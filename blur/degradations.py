"""From a sharp photo to a blurry one: optical and motion blur, lost resolution, sensor noise, JPEG.

A photo here is one (3, H, W) RGB tensor, float in [0, 1], any H, W >= 1; every function gives the same shape.
Chance comes from a ``torch.Generator`` alone: the same seed gives the same pixels.
"""

import io

import math

from dataclasses import dataclass, field

import numpy as np

import torch

import torch.nn.functional as F

from PIL import Image

from torch import Tensor

from utils import quantize_8bit

@dataclass(frozen=True)
class Mixture:
    """What ``random_degradation`` draws from. Strengths of blur are drawn log-uniformly, as many light as heavy."""

    # Share of photos left exactly as they are: a sharpener must know when there is nothing to do
    identity: float = 0.03
    # Weights of the kinds of blur, one of which is drawn for each other photo
    blurs: dict[str, float] = field(
        default_factory=lambda: {
            "gaussian": 0.36,  # soft lenses, and most software blur
            "anisotropic": 0.07,  # astigmatism, slight movement on top of softness
            "defocus": 0.18,  # a disk: out of focus
            "line": 0.16,  # straight motion
            "shake": 0.05,  # a curved path of the hand
            "rescale": 0.16,  # enlarged from fewer pixels, as in a video call
            "none": 0.02,  # noise and JPEG alone
        }
    )
    # The light ends leave a blur that can be seen: with weaker ones in the mixture a network cannot tell them from
    # sharp photos, and learns to leave every light blur as it is
    sigma: tuple[float, float] = (0.4, 3.2)  # pixels; the anisotropic blur draws one for each axis
    radius: tuple[float, float] = (0.7, 4.5)  # pixels, defocus
    line_length: tuple[float, float] = (2.0, 15.0)  # pixels
    shake_length: tuple[float, float] = (3.0, 22.0)  # pixels along the path
    factor: tuple[float, float] = (1.25, 3.2)  # of rescaling
    linear_light: float = 0.12  # share of blurs that mix light, as a lens does, not sRGB codes, as software does
    then_rescale: float = 0.08  # share of other blurs followed by a rescaling
    noise: float = 0.85  # share with sensor noise
    noise_rescaled: float = 0.4  # the same of rescaled photos, whose own noise was smoothed away with their detail
    noise_sigma: tuple[float, float] = (0.3, 2.2)  # 8-bit grey levels, uniform
    jpeg: float = 0.27  # share saved as JPEG at the end
    quality: tuple[float, float] = (30.0, 95.0)  # of JPEG, uniform

def random_degradation(photo: Tensor, generator: torch.Generator, mixture: Mixture | None = None) -> Tensor:
    """Blur ``photo`` in a way drawn at random from ``mixture`` (the default one if None).

    Args:
        photo: (3, H, W) in [0, 1], with the 256 levels of an 8-bit picture.
    Returns:
        (3, H, W) in [0, 1], rounded to 8 bits, as a camera or a PNG would keep it.
    """
    mixture = mixture or Mixture()
    if chance(generator) < mixture.identity:
        return photo.clone()
    kind = list(mixture.blurs)[int(torch.multinomial(torch.tensor(list(mixture.blurs.values())), 1, generator=generator))]
    if kind == "rescale":
        photo = random_rescale(photo, generator, mixture)
    elif kind != "none":
        kernel = random_kernel(kind, generator, mixture)
        linear = chance(generator) < mixture.linear_light
        photo = convolve_linear_light(photo, kernel) if linear else convolve(photo, kernel)
        if chance(generator) < mixture.then_rescale:
            photo = random_rescale(photo, generator, mixture)
    if chance(generator) < (mixture.noise_rescaled if kind == "rescale" else mixture.noise):
        photo = add_noise(photo, uniform(mixture.noise_sigma, generator), generator)
    if chance(generator) < mixture.jpeg:
        photo = jpeg(photo, round(uniform(mixture.quality, generator)))
    return quantize_8bit(photo)

def random_kernel(kind: str, generator: torch.Generator, mixture: Mixture) -> Tensor:
    """A (k, k) kernel of the named kind with a strength drawn from ``mixture``."""
    angle = uniform((0, math.pi), generator)
    if kind == "gaussian":
        return gaussian_kernel(log_uniform(mixture.sigma, generator))
    if kind == "anisotropic":
        sigmas = log_uniform(mixture.sigma, generator), log_uniform(mixture.sigma, generator)
        return gaussian_kernel(*sigmas, angle)
    if kind == "defocus":
        return disk_kernel(log_uniform(mixture.radius, generator))
    if kind == "line":
        return line_kernel(log_uniform(mixture.line_length, generator), angle)
    if kind == "shake":
        return shake_kernel(log_uniform(mixture.shake_length, generator), generator)
    raise ValueError(f"unknown kind of blur {kind!r}: take gaussian, anisotropic, defocus, line, shake, rescale or none")

def random_rescale(photo: Tensor, generator: torch.Generator, mixture: Mixture) -> Tensor:
    down = ("bicubic", "bilinear", "area")[int(torch.randint(3, (), generator=generator))]
    up = ("bicubic", "bicubic", "bilinear")[int(torch.randint(3, (), generator=generator))]
    return rescale(photo, log_uniform(mixture.factor, generator), down, up)

# Kernels: (k, k) float32 tensors with odd k, not negative, of sum 1, their centre of mass in the middle


def gaussian_kernel(sigma: float, sigma_y: float | None = None, angle: float = 0.0) -> Tensor:
    """Gaussian blur; ``sigma`` in pixels along ``angle`` (radians), ``sigma_y`` across it, or round if None."""
    sigma_y = sigma if sigma_y is None else sigma_y
    x, y = grid(math.ceil(4 * max(sigma, sigma_y)))
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    return normalized(torch.exp(-0.5 * ((along / sigma) ** 2 + (across / sigma_y) ** 2)))

def disk_kernel(radius: float) -> Tensor:
    """Defocus: a uniform disk, ``radius`` in pixels. Each pixel counts the part of it that the disk covers."""
    half = math.ceil(radius + 0.5)
    fine = 8  # points per pixel and axis at which the edge is sampled
    points = (torch.arange((2 * half + 1) * fine) + 0.5) / fine - half - 0.5
    inside = (points[:, None] ** 2 + points[None, :] ** 2 <= radius**2).float()
    covered = F.avg_pool2d(inside[None, None], fine)[0, 0]
    covered[half, half] += 1e-6  # a radius below the sampling step is no blur, not a division by zero
    return normalized(covered)

def line_kernel(length: float, angle: float) -> Tensor:
    """Straight uniform motion: ``length`` in pixels, ``angle`` in radians from the x axis."""
    position = torch.linspace(-length / 2, length / 2, 2 * math.ceil(length) + 9)
    return path_kernel(position * math.cos(angle), position * math.sin(angle))

def shake_kernel(length: float, generator: torch.Generator) -> Tensor:
    """Camera shake: a path of ``length`` pixels that wanders, turns and slows down at random.

    A walk with inertia in the spirit of Boracchi and Foi 2012, doi:10.1109/TIP.2012.2192126, section IV.
    """
    steps = 64 + 2 * math.ceil(length)
    wander = uniform((0.02, 0.35), generator)  # radians per step: from nearly straight to curled up
    turns = torch.randn(steps, generator=generator) * wander
    jerks = torch.rand(steps, generator=generator) < 1.5 / steps  # one or two sudden changes of direction
    turns = torch.where(jerks, torch.randn(steps, generator=generator) * 1.5, turns)
    heading = uniform((0, 2 * math.pi), generator) + turns.cumsum(0)
    speed = (torch.randn(steps, generator=generator) * 0.15).cumsum(0).exp()  # slow stretches weigh more
    speed = speed * (length / speed.sum())
    return path_kernel((speed * heading.cos()).cumsum(0), (speed * heading.sin()).cumsum(0))

def path_kernel(x: Tensor, y: Tensor) -> Tensor:
    """The blur of a point that is at ``x[i], y[i]`` (pixels, (n,) each) for one n-th of the exposure each."""
    x, y = x - x.mean(), y - y.mean()
    half = math.ceil(float(torch.maximum(x.abs().max(), y.abs().max()))) + 1
    kernel = torch.zeros(2 * half + 1, 2 * half + 1)
    left, top = x.floor(), y.floor()
    for column, weight_x in ((left, left + 1 - x), (left + 1, x - left)):
        for row, weight_y in ((top, top + 1 - y), (top + 1, y - top)):
            where = (row.long() + half, column.long() + half)
            kernel.index_put_(where, weight_x * weight_y, accumulate=True)  # bilinear: keeps the centre of mass
    return normalized(kernel)

def grid(half: int) -> tuple[Tensor, Tensor]:
    """x and y of every pixel of a kernel of 2 half + 1 rows, (k, k) each, 0 in the middle."""
    position = torch.arange(-half, half + 1, dtype=torch.float32)
    y, x = torch.meshgrid(position, position, indexing="ij")
    return x, y

def normalized(kernel: Tensor) -> Tensor:
    return kernel / kernel.sum()

def convolve_linear_light(photo: Tensor, kernel: Tensor) -> Tensor:
    """As ``blur``, but on light rather than on sRGB codes: bright points spread as they do in a lens."""
    return linear_to_srgb(convolve(srgb_to_linear(photo), kernel))

def srgb_to_linear(photo: Tensor) -> Tensor:
    """IEC 61966-2-1: sRGB codes in [0, 1] to linear light in [0, 1]."""
    return torch.where(photo <= 0.04045, photo / 12.92, ((photo.clamp(min=0) + 0.055) / 1.055) ** 2.4)

def linear_to_srgb(light: Tensor) -> Tensor:
    """IEC 61966-2-1: linear light in [0, 1] to sRGB codes in [0, 1]."""
    light = light.clamp(min=0)
    return torch.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)

def rescale(photo: Tensor, factor: float, down: str = "bicubic", up: str = "bicubic") -> Tensor:
    """Shrink by ``factor`` >= 1 and enlarge back to the same size.

    Args:
        down: "bicubic" or "bilinear", both antialiased, or "area".
        up: "bicubic" or "bilinear".
    """
    height, width = photo.shape[-2:]
    small = max(1, round(height / factor)), max(1, round(width / factor))
    photo = F.interpolate(photo[None], size=small, mode=down, antialias=down != "area")
    return F.interpolate(photo, size=(height, width), mode=up, antialias=True)[0].clamp(0, 1)

def shrink(photo: Tensor, size: tuple[int, int]) -> Tensor:
    """Any number of pixels to fewer, (3, H, W) to (3, *size), rounded to 8 bits; crisper than before."""
    small = F.interpolate(photo[None], size=size, mode="bicubic", antialias=True)[0]
    return quantize_8bit(small)

def add_noise(photo: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """White Gaussian noise, ``sigma`` in 8-bit grey levels; may leave [0, 1]."""
    return photo + torch.randn(photo.shape, generator=generator) * (sigma / 255)

def jpeg(photo: Tensor, quality: int) -> Tensor:
    """Save as JPEG in memory and read it back; ``quality`` as in Pillow, 1 to 95."""
    codes = (photo.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(codes).save(buffer, "JPEG", quality=quality)
    with Image.open(buffer) as picture:
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255

# Chance


def chance(generator: torch.Generator) -> float:
    """Uniform in [0, 1)."""
    return float(torch.rand((), generator=generator))

def uniform(bounds: tuple[float, float], generator: torch.Generator) -> float:
    low, high = bounds
    return low + (high - low) * chance(generator)

def log_uniform(bounds: tuple[float, float], generator: torch.Generator) -> float:
    """Between two bounds above 0, every doubling equally likely."""
    return math.exp(uniform((math.log(bounds[0]), math.log(bounds[1])), generator))
