"""Small tools that every script shares: errors, devices, seeds, PSNR, SSIM.

Images are RGB, float in [0, 1], shape (N, 3, H, W), unless a docstring says otherwise.
"""

import errno

import logging

import os

import signal

import sys

import time

import warnings

from typing import NamedTuple

import numpy as np

import torch

import torch.wrap_distributed as dist

import torch.nn.functional as F

from torch import Tensor

from torch.utils.flop_counter import FlopCounterMode

PERFECT = 50.0  # dB; identical pictures have an infinite PSNR, which would spoil every mean

class Scores(NamedTuple):
    """Means over some photos."""

    psnr: float  # dB
    ssim: float

class UserError(Exception):
    """A mistake the user can mend, told in one sentence; scripts print it and exit with code 1."""

    shared = False  # True: raised on every rank of a torchrun, so that rank 0 alone need print it

def one_line(text: str) -> str:
    """``text`` with the ends of lines and bytes that are no text spelt out: a file's name may hold them."""
    return text.replace("\n", "\\n").encode("utf-8", "backslashreplace").decode()

def pick_device(name: str = "auto", setting: str = "DEVICE") -> torch.device:
    """``"auto"`` is CUDA when there is one, else the CPU; any name that torch knows is taken too, given as ``setting``."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except Exception as error:  # torch has many ways to say so, an AssertionError and an ImportError among them
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise UserError(f"{setting} = {name!r} cannot be used here ({reason}): set it to 'auto' or 'cpu'") from None
    return device

def autocast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where ``device`` computes faster in it, else float32.

    Emulated bfloat16 (most desktop CPUs before 2023) is slower than float32, and so is that of Intel's AVX-512 where AMX is
    absent or hidden by a virtual machine: convolutions took twice as long. It is told by the kind of processor, not by a
    trial, so that a training that is gone on with computes as it did before.
    """
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    elif device.type == "cpu":
        # Where torch is too old to tell, float32 it is
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
        of_amd = "AMD" in capabilities.get("cpu_name", "")
        native = capabilities.get("amx_bf16", False) or (of_amd and capabilities.get("avx512_bf16", False))
    else:
        native = False
    return torch.bfloat16 if native else torch.float32

def autocast(device: torch.device) -> torch.autocast:
    """For a ``with``: networks compute in ``autocast_dtype`` there."""
    dtype = autocast_dtype(device)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

def seed_everything(seed: int) -> None:
    """Seed torch on every device; the weights of a network made after it follow from ``seed``."""
    torch.manual_seed(seed)

def quantize_8bit(image: Tensor) -> Tensor:
    """What an 8-bit picture of ``image`` would hold: clamped to [0, 1] and rounded to 256 levels."""
    return (image.float().clamp(0, 1) * 255).round() / 255

def psnr(prediction: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, over all its channels; higher is better.

    Args:
        prediction, target: (N, C, H, W), values in [0, 1].
    Returns:
        (N,) float32; ``inf`` where the images are identical.
    Raises:
        ValueError: if the shapes differ or are not (N, C, H, W).
    Source: Hore and Ziou 2010, doi:10.1109/ICPR.2010.579, with peak = 1.
    """
    _check_shapes(prediction, target)
    mse = (prediction.float() - target.float()).square().mean(dim=(1, 2, 3))
    return -10 * mse.log10()

def ssim(prediction: Tensor, target: Tensor) -> Tensor:
    """Structural similarity of each image, the mean over its channels; 1 is identical.

    Equals scikit-image's ``structural_similarity(gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False, data_range=1)``: an 11x11 Gaussian window, only where it fits whole.
    An image of fewer than 11 rows or columns is first extended to 11 by repeating its edge
    (scikit-image refuses such an image).

    Args:
        prediction, target: (N, C, H, W), values in [0, 1].
    Returns:
        (N,) float32, at most 1.
    Raises:
        ValueError: if the shapes differ or are not (N, C, H, W).
    Source: Wang et al. 2004, doi:10.1109/TIP.2003.819861, section III-B, K1 = .01, K2 = .03.
    """
    _check_shapes(prediction, target)
    x, y = prediction.float(), target.float()
    missing_rows, missing_columns = max(0, 11 - x.shape[-2]), max(0, 11 - x.shape[-1])
    if missing_rows or missing_columns:
        x, y = (F.pad(image, (0, missing_columns, 0, missing_rows), mode="replicate") for image in (x, y))
    mean_x, mean_y = _gaussian_mean(x), _gaussian_mean(y)
    variance_x = _gaussian_mean(x * x) - mean_x * mean_x
    variance_y = _gaussian_mean(y * y) - mean_y * mean_y
    covariance = _gaussian_mean(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x * mean_x + mean_y * mean_y + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).mean(dim=(1, 2, 3))

def _gaussian_mean(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C, H - 10, W - 10): weighted mean in an 11x11 Gaussian window, sigma 1.5.

    Sums of shifted copies rather than a convolution: under autocast or TF32 a convolution would
    round its input, and SSIM subtracts nearly equal numbers.
    """
    weights = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    weights = (weights / weights.sum()).tolist()
    height, width = x.shape[-2] - 10, x.shape[-1] - 10
    x = sum(weight * x[..., i : i + height, :] for i, weight in enumerate(weights))
    return sum(weight * x[..., :, i : i + width] for i, weight in enumerate(weights))

def _check_shapes(prediction: Tensor, target: Tensor) -> None:
    if prediction.shape != target.shape or prediction.ndim != 4:
        raise ValueError(
            f"both images must be (N, C, H, W) of one shape, not {tuple(prediction.shape)} and {tuple(target.shape)}"
        )

class PSNRAndSSIMLoss(torch.nn.Module):
    """Minus the mean PSNR in dB, and ``ssim_weight`` times what SSIM lacks to 1: what sharpened photos are judged by.

    The mean squared error of a batch is nearly all made by its worst photos; in decibels each counts alike. A floor
    keeps photos that need no sharpening from outweighing all others. SSIM rewards faint texture, of which the squared
    error makes little.

    Args:
        floor: mean squared error that is added to each photo's own; 3e-5 is 45 dB.
        ssim_weight: dB for a whole unit of SSIM; at 20, an SSIM higher by .05 is worth 1 dB.
    Shapes: two (N, C, H, W) in [0, 1] -> ().
    Source: Chen et al. 2021, HINet, arXiv:2105.06086, section 3.3 (PSNR), Zhao et al. 2017, arXiv:1511.08861,
        section III (SSIM beside another loss); the floor is ours.
    """

    def __init__(self, floor: float = 3e-5, ssim_weight: float = 20.0):
        super().__init__()
        self.floor, self.ssim_weight = floor, ssim_weight

    def extra_repr(self) -> str:
        return f"floor={self.floor}, ssim_weight={self.ssim_weight}"

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        mse = (prediction - target).square().mean(dim=(1, 2, 3))
        loss = 10 * (mse + self.floor).log10()
        return (loss + self.ssim_weight * (1 - ssim(prediction, target))).mean()

def count_parameters(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())

@torch.no_grad()
def gmac_per_megapixel(network: torch.nn.Module) -> float:
    """Multiplications and additions for 1,000,000 pixels more of a photo, counted in pairs, in billions.

    What is done once for a photo of any size (the gauge, 0.1 billion) and Fourier transforms are left out.
    """
    parameter = next(network.parameters())
    counts = []
    for size in 128, 256:
        with FlopCounterMode(display=False) as counter:
            network(torch.zeros(1, 3, size, size, device=parameter.device, dtype=parameter.dtype))
        counts.append(counter.get_total_flops() / 2)
    return (counts[1] - counts[0]) / (256**2 - 128**2) / 1e3

@torch.no_grad()
def ms_per_megapixel(network: torch.nn.Module, device: torch.device, size: int = 512) -> float:
    """Median time of ``network`` on a square of ``size`` pixels, scaled to 1,000,000 pixels; 7 runs after 2 warm ones."""
    image = torch.rand(1, 3, size, size, device=device).to(memory_format=torch.channels_last)
    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        with autocast(device):
            network(image)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[2:])) * 1000 * 1e6 / size**2
