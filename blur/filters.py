"""Convolution of whole photos by FFT."""

import io

import math

from dataclasses import dataclass, field

import numpy as np

import torch

import torch.nn.functional as F

from PIL import Image

from torch import Tensor

from utils import quantize_8bit

# What is done to a photo


def convolve(photo: Tensor, kernel: Tensor) -> Tensor:
    """Convolve (3, H, W) with a (k, k) kernel, or (N, 3, H, W) with (N, 1, k, k), borders mirrored.

    By FFT: its cost hardly grows with k.
    """
    height, width = photo.shape[-2:]
    half = kernel.shape[-1] // 2
    rows, columns = (reflect_indices(length, half).to(photo.device) for length in (height, width))
    padded = photo[..., rows, :][..., columns]
    size = padded.shape[-2:]
    spectrum = torch.fft.rfft2(padded) * torch.fft.rfft2(kernel.to(photo), s=size)
    return torch.fft.irfft2(spectrum, s=size)[..., 2 * half :, 2 * half :]

def reflect_indices(size: int, margin: int) -> Tensor:
    """Indices of ``size`` pixels and ``margin`` more at both ends, mirrored about the outermost pixels.

    Unlike padding in torch it takes any margin: a wide blur of a narrow photo is mirrored again and again.
    """
    period = max(1, 2 * (size - 1))
    index = torch.arange(-margin, size + margin) % period
    return torch.minimum(index, period - index)

def apply_filter(photo: Tensor, kernel: Tensor) -> Tensor:
    """(N, 3, H, W) filtered with (N, 1, 63, 63), each photo with its own.

    Outside of training in float64, then rounded: a Fourier transform of a tile rounds otherwise than one of the whole photo.
    """
    exact = not torch.is_grad_enabled() and photo.device.type != "mps"  # which has no float64
    with torch.autocast(photo.device.type, enabled=False):
        dtype = torch.float64 if exact else kernel.dtype
        return convolve(photo.to(dtype), kernel.to(dtype)).to(kernel.dtype)
