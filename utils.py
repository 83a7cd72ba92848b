"""Helpers for all other files: errors, devices, random draws, 8-bit pixels, PSNR, SSIM, losses, the cost of a network.

Images are RGB, float in [0, 1], shape (N, 3, H, W), unless a docstring says otherwise.
"""

import math
import os
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_PSNR = 50.0  # dB, for the mean over validation photos: that of identical images is infinite


class Scores(NamedTuple):
    """Of one photo, or means over a set of photos."""

    psnr: float  # dB
    ssim: float

    def __str__(self) -> str:
        return f"{self.psnr:.2f} dB  SSIM {self.ssim:.4f}"

    def beats(self, other: "Scores") -> bool:
        return self.psnr > other.psnr and self.ssim > other.ssim


class UserError(Exception):
    """An error caused by user input; scripts report it in one sentence, without a traceback, and exit with code 1."""

    shared = False  # raised on every rank of a distributed run, so that rank 0 alone reports it


def one_line(text: str) -> str:
    """``text`` with line breaks and undecodable bytes escaped: file names may contain them."""
    return text.replace("\n", "\\n").encode("utf-8", "backslashreplace").decode()


def print0(text: str) -> None:
    """Print on rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def pick_device(name: str = "auto", setting: str = "DEVICE") -> torch.device:
    """The device called ``name``, by the user in ``setting``; ``"auto"`` is CUDA or Apple's GPU if available, else the CPU.

    CUDA will compute float32 convolutions in float32: TF32 would round strong filters, and rounded ones no longer sum to 0.
    Raises ``UserError`` if torch cannot use that device here.
    """
    torch.backends.cudnn.allow_tf32 = False
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if apple_gpu_works() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
        return device
    except Exception as error:  # RuntimeError, AssertionError or ImportError, depending on the build of torch
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise UserError(f"{setting} = {name!r} cannot be used here ({reason}): set it to 'auto' or 'cpu'") from None


def apple_gpu_works() -> bool:
    """Whether there is an Apple GPU on which this version of torch does what the networks need.

    Some versions have no FFT there, or convolve slices of channels wrongly (github.com/pytorch/pytorch/issues/180984).
    """

    def compute(device: str) -> Tensor:
        image = torch.linspace(0, 1, 4 * 64 * 64).square().view(1, 4, 64, 64)
        image = image.contiguous(memory_format=torch.channels_last).to(device)
        convolved = F.conv2d(image[:, 1:3], image[:, 2:, :3, :3])
        return torch.cat([convolved.flatten(), torch.fft.rfft2(image).abs().flatten()]).cpu()

    try:
        return torch.backends.mps.is_available() and torch.allclose(compute("mps"), compute("cpu"), rtol=1e-3, atol=1e-2)
    except (RuntimeError, TypeError):
        return False


def autocast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where ``device`` computes faster in it, else float32.

    Emulated bfloat16 (most desktop CPUs before 2023) is slower than float32, and so is that of Intel's AVX-512 without
    AMX. The choice depends on the processor, not on a timing, so that a resumed training computes as before.
    """
    native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # absent from older versions of torch
        is_amd = "AMD" in capabilities.get("cpu_name", "")
        native = capabilities.get("amx_bf16") or (is_amd and capabilities.get("avx512_bf16"))
    return torch.bfloat16 if native else torch.float32


def autocast(device: torch.device) -> torch.autocast:
    """Context manager in which networks on ``device`` compute in ``autocast_dtype``; it does nothing if that is float32."""
    dtype = autocast_dtype(device)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def make_generator(*numbers: int) -> torch.Generator:
    """An independent random stream for each tuple of whole numbers >= 0 of the same length."""
    state = np.random.SeedSequence(numbers).generate_state(1)[0]  # torch keeps only the low 32 bits of a seed
    return torch.Generator().manual_seed(int(state))


def chance(generator: torch.Generator) -> float:
    """Uniform in [0, 1)."""
    return float(torch.rand((), generator=generator))


def uniform(bounds: tuple[float, float], generator: torch.Generator) -> float:
    low, high = bounds
    return low + (high - low) * chance(generator)


def log_uniform(bounds: tuple[float, float], generator: torch.Generator) -> float:
    """Between two positive bounds, every doubling equally likely."""
    return math.exp(uniform((math.log(bounds[0]), math.log(bounds[1])), generator))


def choose(options: Sequence, generator: torch.Generator):
    """One of ``options``, all equally likely."""
    return options[int(torch.randint(len(options), (), generator=generator))]


def weighted_choice(weights: dict[str, float], generator: torch.Generator) -> str:
    return list(weights)[int(torch.multinomial(torch.tensor(list(weights.values())), 1, generator=generator))]


def to_tensor(pixels: np.ndarray | Tensor) -> Tensor:
    """(..., H, W, 3) -> (..., 3, H, W) float32; uint8 is scaled to [0, 1]. Memory stays channels-last."""
    image = pixels if isinstance(pixels, Tensor) else torch.from_numpy(np.array(pixels))
    return (image / 255 if image.dtype == torch.uint8 else image.float()).movedim(-1, -3)


def to_pixels(image: Tensor) -> np.ndarray:
    """(3, H, W) float, clamped to [0, 1] -> (H, W, 3) uint8."""
    return (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()


def quantize_8bit(image: Tensor) -> Tensor:
    """``image`` as an 8-bit file would store it: clamped to [0, 1] and rounded to 256 levels."""
    return (image.float().clamp(0, 1) * 255).round() / 255


def psnr(prediction: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, over all channels; ``inf`` where the images are identical.

    Shapes: two (N, C, H, W) in [0, 1] -> (N,) float32; others raise ``ValueError``.
    Source: Hore and Ziou 2010, doi:10.1109/ICPR.2010.579, with peak = 1.
    """
    _check_shapes(prediction, target)
    mse = (prediction.float() - target.float()).square().mean(dim=(1, 2, 3))
    return -10 * mse.log10()


def ssim(prediction: Tensor, target: Tensor) -> Tensor:
    """Structural similarity of each image, averaged over channels; 1 means identical.

    Equals scikit-image's ``structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    data_range=1)``: an 11x11 Gaussian window, only where it fits. An image with fewer than 11 rows or columns, which
    scikit-image refuses, is first extended to 11 by repeating its edge.

    Shapes: two (N, C, H, W) in [0, 1] -> (N,) float32; others raise ``ValueError``.
    Source: Wang et al. 2004, doi:10.1109/TIP.2003.819861, section III-B, K1 = 0.01, K2 = 0.03.
    """
    _check_shapes(prediction, target)
    x, y = prediction.float(), target.float()
    missing_rows, missing_columns = (max(0, 11 - length) for length in x.shape[-2:])
    if missing_rows or missing_columns:
        x, y = (F.pad(each, (0, missing_columns, 0, missing_rows), mode="replicate") for each in (x, y))
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = map(_gaussian_mean, (x, y, x * x, y * y, x * y))
    square_x, square_y, product = mean_x * mean_x, mean_y * mean_y, mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * product + c1) / (square_x + square_y + c1)
    structure = (2 * (mean_xy - product) + c2) / ((mean_xx - square_x) + (mean_yy - square_y) + c2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def _gaussian_mean(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C, H - 10, W - 10): weighted mean in an 11x11 Gaussian window, sigma 1.5.

    A sum of shifted copies instead of a convolution: under autocast or TF32 a convolution would round its input, and
    SSIM subtracts nearly equal numbers.
    """
    weights = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    weights = (weights / weights.sum()).tolist()
    height, width = x.shape[-2] - 10, x.shape[-1] - 10
    x = sum(weight * x[..., i : i + height, :] for i, weight in enumerate(weights))
    return sum(weight * x[..., :, i : i + width] for i, weight in enumerate(weights))


def _check_shapes(prediction: Tensor, target: Tensor) -> None:
    if prediction.shape != target.shape or prediction.ndim != 4:
        shapes = f"{tuple(prediction.shape)} and {tuple(target.shape)}"
        raise ValueError(f"both images must be (N, C, H, W) of one shape, not {shapes}")


def relative_weight(input_mse: Tensor) -> Tensor:
    """Weights of the samples of a batch, (N,) -> (N, 1, 1, 1), which make errors relative to ``input_mse``.

    A batch's mean squared error is dominated by its most degraded photos, and a network learns to harm those that need
    little. Weighted, an error counts as a share of that of the blurry photo, as it does in decibels.
    """
    # The weight of an input of 30 dB is about 1. 3e-5 is 45 dB: photos that are sharp already must not outweigh all others
    return (1e-3 / (input_mse + 3e-5)).view(-1, 1, 1, 1)


class RelativeMSEAndSSIMLoss(nn.Module):
    """Mean squared error relative to that of the blurry photo, plus ``ssim_weight`` times (1 - SSIM): the teacher's loss.

    Near the blurry photo's error its gradient is proportional to PSNR's, whatever the degradation; an image that gets much
    worse costs more than it would in decibels. SSIM rewards faint texture, which the squared error hardly sees.

    Shapes: two (N, C, H, W) in [0, 1] and the ``input_mse`` of their photos, (N,), -> ().
    Source: Zhao et al. 2017, arXiv:1511.08861, section III (SSIM beside another loss).
    """

    def __init__(self, ssim_weight: float = 3.0):
        super().__init__()
        self.ssim_weight = ssim_weight

    def forward(self, prediction: Tensor, target: Tensor, input_mse: Tensor) -> Tensor:
        relative = 1e3 * (relative_weight(input_mse) * (prediction - target).square()).mean(dim=(1, 2, 3))
        return (relative + self.ssim_weight * (1 - ssim(prediction, target))).mean()


class PerceptualLoss(nn.Module):
    """Mean squared error of the pixels plus that of VGG16 features: textures look crisper, at some cost in PSNR.

    Args:
        weight: of the feature term.
        weights: torchvision's name of those of VGG16, which it downloads at the first use (528 MB); None: random weights.
    Shapes: two (N, 3, H, W) in [0, 1] -> (). Raises ``UserError`` if the weights can be neither found nor downloaded.
    Source: Johnson et al. 2016, arXiv:1603.08155, section 3.2, features of relu1_2, relu2_2 and relu3_3.
    """

    def __init__(self, weight: float = 0.01, weights: str | None = "IMAGENET1K_V1"):
        super().__init__()
        from torchvision import models  # takes a second to import

        self.weight = weight
        try:
            layers = models.vgg16(weights=weights).features.eval().requires_grad_(False)
        except (OSError, ValueError, RuntimeError) as error:  # no network, or a damaged file
            reason = one_line(str(error))[:120]
            raise UserError(f"PerceptualLoss cannot download VGG16 ({reason}): connect once, or use nn.MSELoss()") from None
        self.stages = nn.ModuleList([layers[:4], layers[4:9], layers[9:16]])  # each ends with features
        # Of ImageNet, which VGG16 was trained on. Buffers, since transforms.Normalize copies its own in every step
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(-1, 1, 1))

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        x, y = ((each - self.mean) / self.std for each in (prediction, target))
        loss = F.mse_loss(prediction, target)
        for stage in self.stages:
            x, y = stage(x), stage(y)
            loss = loss + self.weight * F.mse_loss(x, y)
        return loss


def zero_init(layer: nn.Module) -> nn.Module:
    """``layer`` itself with zero weights and bias, so that what it is added to starts unchanged."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def count_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@torch.no_grad()
def gmac_per_megapixel(network: nn.Module) -> float:
    """Billions of multiply-accumulate operations per million pixels.

    Work done once per photo (a blur estimate: 0.03 GMAC) and Fourier transforms are not counted; the teacher's estimates
    by region are.
    """
    from torch.utils.flop_counter import FlopCounterMode  # takes a third of a second to import

    parameter = next(network.parameters())
    flops = []
    for size in 128, 256:
        with FlopCounterMode(display=False) as counter:
            network(torch.zeros(1, 3, size, size).to(parameter))
        flops.append(counter.get_total_flops())
    return (flops[1] - flops[0]) / 2 / (256**2 - 128**2) / 1e3


@torch.no_grad()
def ms_per_megapixel(network: nn.Module, device: torch.device, size: int = 512) -> float:
    """Median time of ``network`` on a ``size`` x ``size`` image, scaled to a million pixels; 7 runs after 2 for warm-up."""
    image = torch.rand(1, 3, size, size, device=device).to(memory_format=torch.channels_last)
    ends = []
    for _ in range(9):
        with autocast(device):
            network(image)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        ends.append(time.perf_counter())
    return float(np.median(np.diff(ends)[1:])) * 1000 * 1e6 / size**2
