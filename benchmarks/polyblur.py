"""Polyblur, the method nearest to ours without a network, beside Pillow's unsharp mask: quality and ms per megapixel.

    python benchmarks/polyblur.py PAIRS

PAIRS are as for evaluate.py. Polyblur, too, estimates the blur first, a Gaussian, from the steepest edges in each direction,
and then undoes it with one linear filter, a polynomial in that Gaussian. Times: CPU time of all cores.

Source: Delbracio et al. 2021, "Polyblur: Removing mild blur by polynomial reblurring", arXiv:2012.09322; analysed by Eboli
et al. 2022, doi:10.5201/ipol.2022.405, with whose constants; only how derivatives are taken was chosen on results, of four
crops. Optional masks for noise and saturation are left out.
"""

import functools
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.interpolate import CubicSpline
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from blur.filters import convolve, gaussian_kernel, reflect_pad
from cli import CliParser, run_cli
from evaluate import DEFAULT_MASK, degradation_table, find_degradations, read_pair, summary_table
from training.report import score
from utils import quantize_8bit, to_pixels, to_tensor

ITERATIONS = 1, 3
SLOPE, NATIVE_BLUR = 0.352, 0.768  # sigma^2 = (SLOPE / steepest edge)^2 - NATIVE_BLUR^2, in pixels
SIGMAS = 0.3, 4.0  # pixels, the range of the estimate
ANGLES, FINE_ANGLES = 6, 30  # directions of the gradient, and of its interpolation
OUTLIERS = 1e-4  # share of the pixels that may be darker, and brighter, than the range of gray
ALPHA, BETA = 6.0, 1.0  # of the polynomial: its curvature, which raises middle frequencies, and its value where K is 0


def main() -> None:
    parser = CliParser(__doc__)
    parser.add_argument("pairs", type=Path, help="folder of pairs, or of degradations")
    options = parser.parse_args()
    methods = {"unsharp mask": lambda photo: to_tensor(Image.fromarray(to_pixels(photo)).filter(DEFAULT_MASK))}
    methods |= {f"Polyblur, iterations: {n}": functools.partial(polyblur, iterations=n) for n in ITERATIONS}
    results, seconds, megapixels = {}, dict.fromkeys(methods, 0.0), 0.0
    for degradation, folders in find_degradations(options.pairs).items():
        scores = results[degradation] = {name: {} for name in ("input", *methods)}
        for folder in tqdm(folders, degradation, unit="photo", leave=False, disable=None):
            blurry, sharp = read_pair(folder)
            scores["input"][folder.name] = score(blurry, sharp)
            megapixels += blurry[0].numel() / 1e6
            for name, method in methods.items():
                start = time.process_time()
                output = quantize_8bit(method(blurry))
                seconds[name] += time.process_time() - start
                scores[name][folder.name] = score(output, sharp)
    costs = {name: ["", "", f"{1000 * spent / megapixels:.0f}"] for name, spent in seconds.items()}
    print(f"{degradation_table(results)}\n\n{summary_table(results, costs)}")


def polyblur(photo: Tensor, iterations: int = 3) -> Tensor:
    """A sharper (3, H, W), in [0, 1] as ``photo`` is. Each iteration estimates the blur that the one before left."""
    for _ in range(iterations):
        sharper = convolve(photo, inverse_filter(gaussian_kernel(*estimate_gaussian(photo))))
        photo = remove_halos(photo, sharper).clamp(0, 1)
    return photo


def estimate_gaussian(photo: Tensor) -> tuple[float, float, float]:
    """Sigma in pixels along an angle and across it, and that angle in radians: the paper's estimate of mild blur.

    The steepest edges of sharp photos, of gray from 0 to 1, are about equally steep, whatever the photo and the direction;
    a Gaussian blur flattens them, most in its own direction. As in the analysis, derivatives are those of the interpolated
    photo; but borders are mirrored, since steps between opposite ones would be the steepest edges.
    """
    gray = photo.mean(0)
    low, high = np.quantile(gray.numpy(), (OUTLIERS, 1 - OUTLIERS)).tolist()
    gray = ((gray - low) / max(high - low, 1 / 255)).clamp(0, 1)
    x, y = exact_derivative(gray), exact_derivative(gray.mT).mT
    coarse, fine = np.linspace(0, np.pi, ANGLES + 1), np.linspace(0, np.pi, FINE_ANGLES + 1)[:-1]
    steepest = [float((x * math.cos(angle) + y * math.sin(angle)).abs().max()) for angle in coarse[:-1]]
    steepest = CubicSpline(coarse, [*steepest, steepest[0]], bc_type="periodic")(fine).clip(1e-4)
    sigmas = np.sqrt((SLOPE**2 / steepest**2 - NATIVE_BLUR**2).clip(SIGMAS[0] ** 2, SIGMAS[1] ** 2))
    along = int(steepest.argmin())
    return float(sigmas[along]), float(sigmas[(along + FINE_ANGLES // 2) % FINE_ANGLES]), float(fine[along])


def exact_derivative(gray: Tensor) -> Tensor:
    """Of (H, W) along x, per pixel, by its spectrum."""
    mirrored = torch.cat([gray, gray.flip(-1)], -1)
    spectrum = torch.fft.rfft(mirrored) * (2j * math.pi * torch.fft.rfftfreq(mirrored.shape[-1]))
    return torch.fft.irfft(spectrum, mirrored.shape[-1])[:, : gray.shape[-1]]


def inverse_filter(kernel: Tensor) -> Tensor:
    """(k, k) symmetric blur kernel -> (3k - 2, 3k - 2) filter that undoes it: the paper's polynomial reblurring.

    p(K) of degree 3 is close to 1 / K where the blur's response K is close to 1: p(1) = 1, p'(1) = -1; but p''(1) = ALPHA,
    not 2. Where the blur leaves nothing, p(0) = BETA, while 1 / K would amplify noise without limit.
    """
    padded = F.pad(kernel, [kernel.shape[-1] // 2 * 2] * 4)  # to the size of that kernel applied three times
    x = torch.fft.fft2(torch.fft.ifftshift(padded)).real - 1
    response = 1 - x + ALPHA / 2 * x**2 + (2 + ALPHA / 2 - BETA) * x**3
    return torch.fft.fftshift(torch.fft.ifft2(response).real)


def remove_halos(photo: Tensor, sharper: Tensor) -> Tensor:
    """``sharper`` with as much of ``photo`` mixed in as keeps gradients from being reversed: the paper's halo removal."""
    before, after = (torch.gradient(reflect_pad(image, 1), dim=(-1, -2)) for image in (photo, sharper))
    reversal = -(before[0] * after[0] + before[1] * after[1]).clamp(max=0)
    share = reversal / (before[0] ** 2 + before[1] ** 2 + reversal).clamp(min=1e-12)
    return sharper.lerp(photo, share[:, 1:-1, 1:-1])


if __name__ == "__main__":
    run_cli(main)
