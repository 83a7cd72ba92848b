"""What cameras, phones and web sites do to a photo after the lens: noise, smoothing, sharpening, resizing, overlays, JPEG.

A photo is one (3, H, W) RGB tensor, float in [0, 1]; randomness comes from a ``torch.Generator`` alone.
"""

import io

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

from blur.filters import convolve, gaussian_kernel
from utils import chance, choose, log_uniform, to_pixels, to_tensor, uniform

SHRINKING = [Image.BOX, Image.BILINEAR, Image.HAMMING, Image.NEAREST, *2 * [Image.BICUBIC, Image.LANCZOS]]
ENLARGING = [Image.BILINEAR, Image.HAMMING, *2 * [Image.BICUBIC, Image.LANCZOS]]


def add_noise(photo: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """White Gaussian noise, ``sigma`` in 8-bit gray levels; may leave [0, 1]."""
    return photo + torch.randn(photo.shape, generator=generator) * (sigma / 255)


def strong_noise(photo: Tensor, generator: torch.Generator) -> Tensor:
    """2 to 20 gray levels: white, stronger in bright parts, or coarse; may leave [0, 1]."""
    sigma, kind = log_uniform((2, 20), generator), chance(generator)
    noise = torch.randn(photo.shape, generator=generator)
    if kind < 0.22:
        noise = noise * (0.3 + 1.2 * photo.clamp(0, 1)).sqrt()
    elif kind < 0.4:
        noise = convolve(noise, gaussian_kernel(uniform((0.4, 1.0), generator)))
        noise = noise / noise.std(correction=0).clamp(min=1e-6)
    return photo + noise * (sigma / 255)


def sensor_noise(photo: Tensor, generator: torch.Generator) -> Tensor:
    """Shot and read noise in linear light behind a Bayer mosaic, bilinear demosaicing, smoothed colors.

    Source: Foi et al. 2008, doi:10.1109/TIP.2008.2001399, section II (noise that depends on the signal).
    """
    gain, gamma = log_uniform((2e-4, 9e-3), generator), uniform((1.8, 2.4), generator)
    light = photo.clamp(0, 1) ** gamma
    sigma = (gain * light + (uniform((0.05, 0.3), generator) * gain) ** 2).sqrt()
    raw = (light + torch.randn(light.shape, generator=generator) * sigma).clamp(min=0)
    if chance(generator) < 0.8:
        rows, columns = torch.arange(photo.shape[1])[:, None], torch.arange(photo.shape[2])
        green = (rows + columns) % 2 == int(torch.randint(2, (), generator=generator))
        red = (rows % 2 == int(torch.randint(2, (), generator=generator))) & ~green
        seen = torch.stack([red, green, ~red & ~green]).float()
        weights = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]).expand(3, 1, 3, 3)
        planes = F.pad(torch.stack([raw * seen, seen]), (1, 1, 1, 1), mode="replicate")
        known, total = F.conv2d(planes, weights, groups=3)
        raw = torch.where(total > 0, known / total.clamp(min=1e-6), raw)
    developed = raw.clamp(0, 1) ** (1 / gamma)
    if chance(generator) < 0.7:
        gray = developed.mean(0, keepdim=True)
        developed = gray + convolve(developed - gray, gaussian_kernel(uniform((0.4, 2.0), generator)))
    return developed


def smooth_noise(photo: Tensor, generator: torch.Generator) -> Tensor:
    """What phones do against noise: a Gaussian, a median, or half of each."""
    soft = convolve(photo, gaussian_kernel(uniform((0.4, 1.0), generator)))
    kind = choose(("gaussian", "median", "both"), generator)
    if kind == "gaussian" or min(photo.shape[1:]) < 3:
        return soft
    median = filter_image(photo, ImageFilter.MedianFilter(3))
    return median if kind == "median" else 0.5 * median + 0.5 * soft


def sharpen_too_much(photo: Tensor, generator: torch.Generator) -> Tensor:
    """An unsharp mask of any strength, halos and all."""
    radius, percent = log_uniform((0.5, 3), generator), round(log_uniform((25, 220), generator))
    return filter_image(photo, ImageFilter.UnsharpMask(radius, percent, choose((0, 0, 0, 1, 2, 3), generator)))


def resize_chain(photo: Tensor, factors: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Shrink by a factor in that range and enlarge again, sometimes with a step in between; any common filters."""
    height, width = photo.shape[-2:]
    image = Image.fromarray(to_pixels(photo))
    scales = [1 / log_uniform(factors, generator)]
    if chance(generator) < 0.15:
        scales.append(scales[0] * uniform((0.7, 1.4), generator))
    for scale, filters in zip(scales, (SHRINKING, ENLARGING), strict=False):
        size = max(1, round(width * scale)), max(1, round(height * scale))
        image = image.resize(size, choose(filters, generator))
    return to_tensor(image.resize((width, height), choose(ENLARGING, generator)))


def jpeg(photo: Tensor, quality: int, subsampling: int = 2) -> Tensor:
    """Compress in memory as JPEG with Pillow's ``quality``, 1 to 95, and ``subsampling``, 0 (4:4:4) to 2 (4:2:0)."""
    buffer = io.BytesIO()
    Image.fromarray(to_pixels(photo)).save(buffer, "JPEG", quality=quality, subsampling=subsampling)
    return to_tensor(Image.open(buffer))


def random_jpeg(photo: Tensor, generator: torch.Generator) -> Tensor:
    """Compressed once, or twice as when a picture is shared again."""
    for _ in range(1 + (chance(generator) < 0.15)):
        photo = jpeg(photo, round(uniform((30, 95), generator)), 0 if chance(generator) < 0.35 else 2)
    return photo


def overlay(pair: tuple[Tensor, Tensor], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """What no lens made, drawn on the blurry and the sharp photo alike: bars of a film, a frame, text, a panel."""
    height, width = pair[0].shape[-2:]
    kind = choose(("bars", "frame", "text", "text", "panel"), generator)
    fill = choose(((0, 0, 0), (0, 0, 0), (255, 255, 255), (240, 240, 240), (30, 30, 40)), generator)
    ink = choose(((255, 255, 255), (255, 220, 60), (0, 0, 0), (255, 120, 0)), generator)
    upright, outlined = chance(generator) < 0.4, chance(generator) < 0.5
    first, second = (int(uniform((0, (width if upright else height) / 3), generator)) for _ in range(2))
    border = 2 + int(uniform((0, min(height, width) / 8), generator))
    place = uniform((0, width / 2), generator), uniform((0, max(1, height - 12)), generator)
    letters = "".join(map(chr, torch.randint(97, 123, (30,), generator=generator).tolist()))
    text = " ".join(letters[i : i + 5] for i in range(0, 5 * choose((1, 2, 4, 6), generator), 5))
    font = ImageFont.load_default(round(uniform((10, 34), generator)))
    images = [Image.fromarray(to_pixels(photo)) for photo in pair]
    for draw in map(ImageDraw.Draw, images):
        if kind in ("bars", "panel"):
            draw.rectangle((0, 0, first, height) if upright else (0, 0, width, first), fill)
        if kind == "bars":
            draw.rectangle((width - second if upright else 0, 0 if upright else height - second, width, height), fill)
        if kind == "frame":
            draw.rectangle((0, 0, width - 1, height - 1), outline=fill, width=border)
        if kind in ("text", "panel"):
            contrast = tuple(255 - channel for channel in ink)
            draw.text(place, text, ink, font, stroke_width=int(outlined), stroke_fill=contrast)
    return tuple(map(to_tensor, images))


def filter_image(photo: Tensor, image_filter: ImageFilter.Filter) -> Tensor:
    return to_tensor(Image.fromarray(to_pixels(photo)).filter(image_filter))
