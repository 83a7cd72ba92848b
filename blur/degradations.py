"""Turns sharp photos into blurry ones: optical and motion blur, lost resolution, sensor noise, JPEG.

A photo is one (3, H, W) RGB tensor, float in [0, 1], any H, W >= 1; every function returns the same shape.
Randomness comes from a ``torch.Generator`` alone: the same seed gives the same pixels.
"""

import io
import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from blur.filters import convolve, convolve_linear_light, disk_kernel, gaussian_kernel, line_kernel, shake_kernel
from utils import quantize_8bit, to_pixels, to_tensor


@dataclass(frozen=True)
class Mixture:
    """What ``random_degradation`` draws from. Blur strengths are drawn log-uniformly: as many light ones as heavy ones."""

    # Share of photos left as they are: a sharpener must recognise when there is nothing to do
    identity: float = 0.03
    # Weights of the kinds of blur, one of which is drawn for each other photo
    blurs: dict[str, float] = field(
        default_factory=lambda: {
            "gaussian": 0.36,  # soft lenses, and most software blur
            "anisotropic": 0.07,  # astigmatism, slight motion on top of softness
            "defocus": 0.18,  # a disk: out of focus
            "line": 0.16,  # straight motion
            "shake": 0.05,  # the curved path of a hand
            "rescale": 0.16,  # enlarged from fewer pixels, as in a video call
            "none": 0.02,  # noise and JPEG alone
        }
    )
    # The light ends leave a visible blur: with weaker ones in the mixture a network cannot tell them from sharp photos
    # and learns to leave every light blur as it is
    sigma: tuple[float, float] = (0.4, 3.2)  # pixels; the anisotropic blur draws one for each axis
    radius: tuple[float, float] = (0.7, 4.5)  # pixels, defocus
    line_length: tuple[float, float] = (2.0, 15.0)  # pixels
    shake_length: tuple[float, float] = (3.0, 22.0)  # pixels along the path
    factor: tuple[float, float] = (1.25, 3.2)  # of rescaling
    linear_light: float = 0.12  # share of blurs in linear light, as in a lens, instead of sRGB, as in software
    then_rescale: float = 0.08  # share of other blurs followed by rescaling
    noise: float = 0.85  # share with sensor noise
    noise_rescaled: float = 0.4  # the same for rescaled photos, where noise was averaged away with the detail
    noise_sigma: tuple[float, float] = (0.3, 2.2)  # 8-bit gray levels, uniform
    jpeg: float = 0.27  # share saved as JPEG at the end
    quality: tuple[float, float] = (30.0, 95.0)  # of JPEG, uniform


def random_degradation(photo: Tensor, generator: torch.Generator, mixture: Mixture | None = None) -> Tensor:
    """Degrade ``photo`` in a way drawn at random from ``mixture`` (by default ``Mixture()``).

    Args:
        photo: (3, H, W) in [0, 1], with the 256 levels of an 8-bit image.
    Returns:
        (3, H, W) in [0, 1], rounded to 8 bits, as a camera or a PNG would store it.
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
    """A (k, k) kernel of that kind with a strength drawn from ``mixture``."""
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
    raise ValueError(f"unknown kind of blur {kind!r}: use gaussian, anisotropic, defocus, line, shake, rescale or none")


def random_rescale(photo: Tensor, generator: torch.Generator, mixture: Mixture) -> Tensor:
    down = ("bicubic", "bilinear", "area")[int(torch.randint(3, (), generator=generator))]
    up = ("bicubic", "bicubic", "bilinear")[int(torch.randint(3, (), generator=generator))]
    return rescale(photo, log_uniform(mixture.factor, generator), down, up)


def rescale(photo: Tensor, factor: float, down: str = "bicubic", up: str = "bicubic") -> Tensor:
    """Shrink by ``factor`` >= 1 and enlarge to the old size again.

    Args:
        down: "bicubic" or "bilinear", both antialiased, or "area".
        up: "bicubic" or "bilinear".
    """
    height, width = photo.shape[-2:]
    small = max(1, round(height / factor)), max(1, round(width / factor))
    photo = F.interpolate(photo[None], size=small, mode=down, antialias=down != "area")
    return F.interpolate(photo, size=(height, width), mode=up, antialias=True)[0].clamp(0, 1)


def shrink(photo: Tensor, size: tuple[int, int]) -> Tensor:
    """(3, H, W) -> (3, *size), any smaller size, rounded to 8 bits; crisper than before."""
    return quantize_8bit(F.interpolate(photo[None], size=size, mode="bicubic", antialias=True)[0])


def add_noise(photo: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """White Gaussian noise, ``sigma`` in 8-bit gray levels; may leave [0, 1]."""
    return photo + torch.randn(photo.shape, generator=generator) * (sigma / 255)


def jpeg(photo: Tensor, quality: int) -> Tensor:
    """Compress in memory as JPEG with Pillow's ``quality``, 1 to 95."""
    buffer = io.BytesIO()
    Image.fromarray(to_pixels(photo)).save(buffer, "JPEG", quality=quality)
    with Image.open(buffer) as image:
        return to_tensor(image)


# Random numbers


def chance(generator: torch.Generator) -> float:
    """Uniform in [0, 1)."""
    return float(torch.rand((), generator=generator))


def uniform(bounds: tuple[float, float], generator: torch.Generator) -> float:
    low, high = bounds
    return low + (high - low) * chance(generator)


def log_uniform(bounds: tuple[float, float], generator: torch.Generator) -> float:
    """Between two positive bounds, every doubling equally likely."""
    return math.exp(uniform((math.log(bounds[0]), math.log(bounds[1])), generator))
