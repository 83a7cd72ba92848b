"""Makes training photos more diverse before they are degraded: contrast, saturation, texture and grain, in the target too.

A photo is one (3, H, W) RGB tensor, float in [0, 1]; randomness comes from a ``torch.Generator`` alone.
"""

import math

import torch
from torch import Tensor

from blur.filters import convolve, gaussian_kernel, line_kernel
from blur.spatial import random_mask
from utils import chance, choose, log_uniform, quantize_8bit, uniform


def vary_photo(photo: Tensor, generator: torch.Generator) -> Tensor:
    """The same photo with other contrast and saturation, or with hair, grass or grain on a part of it; rounded to 8 bits.

    Some photos stay as they are. A network that has seen few crisp textures takes them for noise and smooths them, and one
    that has seen few photos with grain of their own cleans them all.
    """
    if chance(generator) < 0.4:
        pivot = photo.mean((1, 2), keepdim=True)
        photo = pivot + log_uniform((0.6, 1.8), generator) * (photo - pivot)
    if chance(generator) < 0.25:
        gray = photo.mean(0, keepdim=True)
        photo = gray + uniform((0, 1.6), generator) * (photo - gray)
    if chance(generator) < 0.3:
        photo = add_texture(photo, generator)
    if chance(generator) < 0.2:
        photo = add_grain(photo, generator)
    return quantize_8bit(photo.clamp(0, 1))


def add_texture(photo: Tensor, generator: torch.Generator) -> Tensor:
    """Hair or grass (short lines of one direction) or grain on a part of the photo; may leave [0, 1].

    It has hardly any color, unlike the noise of a camera (camera.py), so that a network can tell them apart.
    """
    noise = torch.randn(1, *photo.shape[1:], generator=generator)
    kind = choose(("hair", "hair", "grain", "coarse"), generator)
    if kind == "hair":
        noise = convolve(noise, line_kernel(log_uniform((2, 14), generator), uniform((0, math.pi), generator)))
    elif kind == "coarse":
        noise = convolve(noise, gaussian_kernel(uniform((0.4, 0.9), generator)))
    noise = noise / noise.std(correction=0).clamp(min=1e-6)
    if chance(generator) < 0.8:
        noise = noise * random_mask(photo, uniform((0.15, 0.8), generator), generator)
    tint = 1 + 0.15 * torch.randn(3, 1, 1, generator=generator)
    return photo + log_uniform((4, 40), generator) / 255 * tint * noise * (0.4 + photo.clamp(0, 1))


def add_grain(photo: Tensor, generator: torch.Generator) -> Tensor:
    """Film grain or a camera's noise that a sharp photo has of its own, 1 to 8 gray levels; may leave [0, 1].

    Like ``camera.strong_noise``, but a little smoother in the mean, and more of it gray.
    """
    noise = torch.randn(photo.shape, generator=generator)
    gray = noise.mean(0, keepdim=True) * math.sqrt(3)
    noise = gray + choose((0, 0.3, 0.6, 1), generator) * (noise - gray)
    if chance(generator) < 0.7:
        noise = convolve(noise, gaussian_kernel(uniform((0.3, 0.8), generator)))
    noise = noise / noise.std(correction=0).clamp(min=1e-6)
    if chance(generator) < 0.3:
        noise = noise * (0.3 + 1.2 * photo.clamp(0, 1)).sqrt()
    return photo + log_uniform((1, 8), generator) / 255 * noise
