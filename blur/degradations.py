"""Turns sharp photos into degraded ones, in a way drawn at random: what the networks learn to undo.

Some are blurred alike all over, as software does, with a little noise. The others went through a camera: blur that
may differ from place to place (spatial.py), then noise, smoothing, sharpening, resizing, overlays and JPEG (camera.py).

A photo is one (3, H, W) RGB tensor, float in [0, 1], any H, W >= 1, and keeps its shape.
Randomness comes from a ``torch.Generator`` alone: the same seed gives the same pixels.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from blur import camera
from blur.filters import convolve, convolve_linear_light, disk_kernel, gaussian_kernel, line_kernel, shake_kernel
from blur.spatial import camera_shake, graded_focus, layered_focus, moving_object
from utils import chance, log_uniform, quantize_8bit, uniform, weighted_choice


@dataclass(frozen=True)
class Mixture:
    """What ``random_degradation`` draws from. Blur strengths are drawn log-uniformly: as many light ones as heavy ones."""

    # Share of photos left as they are: a sharpener must recognise when there is nothing to do
    identity: float = 0.06
    # Share of the others that went through a camera; all other settings are for the rest, blurred alike all over
    camera: float = 0.74
    # Weights of the kinds of blur, one of which is drawn for each photo
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


# Weights of the kinds of blur of photos that went through a camera, and of noise for each of them
CAMERA_BLURS = {"none": 0.34, "uniform": 0.17, "layers": 0.17, "graded": 0.03, "moving": 0.11, "shake": 0.07, "resize": 0.15}
UNIFORM_BLURS = {"gaussian": 0.5, "anisotropic": 0.1, "defocus": 0.2, "line": 0.15, "shake": 0.05}
SPATIAL_BLURS = {"layers": layered_focus, "graded": graded_focus, "moving": moving_object, "shake": camera_shake}
CAMERA_NOISE = {"none": 0.2, "little": 0.42, "strong": 0.25, "sensor": 0.13}
NOISE_WITHOUT_BLUR = {"none": 0.3, "little": 0.4, "strong": 0.16, "sensor": 0.14}
NOISE_RESIZED = {"none": 0.55, "little": 0.25, "strong": 0.12, "sensor": 0.08}  # averaged away with the detail
SMOOTHED = {"none": 0.03, "little": 0.25, "strong": 0.35, "sensor": 0.35}  # share of photos with that noise


def random_degradation(photo: Tensor, generator: torch.Generator, mixture: Mixture | None = None) -> tuple[Tensor, Tensor]:
    """Degrade ``photo`` in a way drawn at random from ``mixture`` (by default ``Mixture()``).

    Args:
        photo: (3, H, W) in [0, 1], with the 256 levels of an 8-bit image.
    Returns:
        blurry and sharp, (3, H, W) in [0, 1], rounded to 8 bits, as a camera or a PNG would store them. Sharp is
        ``photo`` unless something was drawn on both (``camera.overlay``) or they were made black and white.
    """
    mixture = mixture or Mixture()
    if chance(generator) < mixture.identity:
        return photo.clone(), photo
    if mixture.camera and chance(generator) < mixture.camera:
        return camera_degradation(photo, generator)
    kind = weighted_choice(mixture.blurs, generator)
    blurry = photo
    if kind == "rescale":
        blurry = camera.resize_chain(blurry, mixture.factor, generator)
    elif kind != "none":
        kernel = random_kernel(kind, generator, mixture)
        linear = chance(generator) < mixture.linear_light
        blurry = convolve_linear_light(blurry, kernel) if linear else convolve(blurry, kernel)
        if chance(generator) < mixture.then_rescale:
            blurry = camera.resize_chain(blurry, mixture.factor, generator)
    if chance(generator) < (mixture.noise_rescaled if kind == "rescale" else mixture.noise):
        blurry = camera.add_noise(blurry, uniform(mixture.noise_sigma, generator), generator)
    if chance(generator) < mixture.jpeg:
        blurry = camera.jpeg(blurry, round(uniform(mixture.quality, generator)))
    return quantize_8bit(blurry), photo


def camera_degradation(photo: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """As ``random_degradation``, for a photo that went through a camera and perhaps a web site."""
    blurry, sharp = photo, photo
    kind = weighted_choice(CAMERA_BLURS, generator)
    if kind == "none":
        # A lens that is hardly soft. With few photos of this kind a network takes what a phone does to a good one for blur
        if chance(generator) < 0.35:
            blurry = convolve(photo, gaussian_kernel(log_uniform((0.3, 0.8), generator)))
    elif kind == "uniform":
        strengths = Mixture(line_length=(2, 24), shake_length=(3, 26))
        kernel = random_kernel(weighted_choice(UNIFORM_BLURS, generator), generator, strengths)
        blurry = convolve_linear_light(photo, kernel) if chance(generator) < 0.3 else convolve(photo, kernel)
    elif kind == "resize":
        if chance(generator) < 0.4:
            blurry = convolve(photo, gaussian_kernel(log_uniform((0.4, 1.0), generator)))
        blurry = camera.resize_chain(blurry, (1.1, 3.2), generator)
    else:
        blurry = SPATIAL_BLURS[kind](photo, generator)
    weights = {"none": NOISE_WITHOUT_BLUR, "resize": NOISE_RESIZED}.get(kind, CAMERA_NOISE)
    noise = weighted_choice(weights, generator)
    if noise == "little":
        blurry = camera.add_noise(blurry, uniform((0.2, 3.5), generator), generator)
    elif noise == "strong":
        blurry = camera.strong_noise(blurry, generator)
    elif noise == "sensor":
        blurry = camera.sensor_noise(blurry, generator)
    blurry = blurry.clamp(0, 1)
    smoothed = chance(generator) < SMOOTHED[noise]
    if smoothed:
        blurry = camera.smooth_noise(blurry, generator)
    # A phone sharpens what it has smoothed, people what is soft
    if chance(generator) < (0.5 if smoothed else 0.43 if kind == "uniform" else 0.25):
        blurry = camera.sharpen_too_much(blurry, generator)
    if kind != "resize" and chance(generator) < 0.08:
        blurry = camera.resize_chain(blurry, (1.1, 2.2), generator)
    if chance(generator) < 0.06:
        blurry, sharp = camera.overlay((blurry, sharp), generator)
    if chance(generator) < 0.05:  # black and white
        blurry, sharp = (each.mean(0, keepdim=True).expand_as(photo) for each in (blurry, sharp))
    if chance(generator) < {"sensor": 0.6}.get(noise, 0.5 if smoothed or kind == "none" else 0.35):
        blurry = camera.random_jpeg(blurry, generator)
    return quantize_8bit(blurry), quantize_8bit(sharp)


def random_kernel(kind: str, generator: torch.Generator, mixture: Mixture) -> Tensor:
    """A (k, k) kernel of that kind with a strength drawn from ``mixture``."""
    angle = uniform((0, math.pi), generator)
    if kind == "gaussian":
        return gaussian_kernel(log_uniform(mixture.sigma, generator))
    if kind == "anisotropic":
        return gaussian_kernel(log_uniform(mixture.sigma, generator), log_uniform(mixture.sigma, generator), angle)
    if kind == "defocus":
        return disk_kernel(log_uniform(mixture.radius, generator))
    if kind == "line":
        return line_kernel(log_uniform(mixture.line_length, generator), angle)
    if kind == "shake":
        return shake_kernel(log_uniform(mixture.shake_length, generator), generator)
    raise ValueError(f"unknown kind of blur {kind!r}: use gaussian, anisotropic, defocus, line, shake, rescale or none")


def resize(photo: Tensor, size: tuple[int, int], mode: str = "bicubic") -> Tensor:
    """(3, H, W) -> (3, *size), rounded to 8 bits; a smaller photo is crisper. Mode: "bicubic" or "nearest"."""
    return quantize_8bit(F.interpolate(photo[None], size=size, mode=mode, antialias=mode != "nearest")[0])
