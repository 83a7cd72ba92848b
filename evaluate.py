"""Compares sharpeners on pairs of photos: how good each is, what it gains over the blurry input, what it costs.

    python evaluate.py                                      the validation pairs in data/val
    python evaluate.py PAIRS other.pth --picture best.png   PAIRS/NNN/{blurry,sharp}.png or PAIRS/DEGRADATION/NNN/...

The unsharp mask is listed at Pillow's default setting and as an oracle: the best of a grid of settings, tuned for each
degradation on the ground truth. Scores are of 8-bit images, and a photo counts for at most 50 dB, as in train.py; a mean
over degradations counts each of them once.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter
from torch import Tensor
from tqdm import tqdm

from blur.filters import convolve, gaussian_kernel
from cli import CliParser, check_writable, run_cli
from dataset import find_pairs
from images.demo_data import find_or_make_data
from images.files import atomic
from images.photos import SYSTEM_FOLDERS, raise_problems, read_photo, upright_size
from inference import Sharpener
from models import load_model
from training.report import score, share_of, side_by_side, write_table
from utils import (
    MAX_PSNR,
    Scores,
    UserError,
    count_parameters,
    gmac_per_megapixel,
    ms_per_megapixel,
    one_line,
    pick_device,
    psnr,
    quantize_8bit,
    to_pixels,
    to_tensor,
)

DATA = "data"  # its val/ is scored unless another folder is named; without pairs, the demo data
NETWORKS = {  # the first file that exists
    "student": ("best_student_model.pth", Path(__file__).resolve().parent / "weights" / "student.pth"),
    "teacher": (Path(__file__).resolve().parent / "weights" / "teacher.pth",),
}
DEVICE = "auto"  # CUDA or Apple's GPU if available; or "cpu", "cuda:1", ...
BASELINES = ("input", "unsharp", "best unsharp")
DEFAULT_MASK = ImageFilter.UnsharpMask(radius=2, percent=150, threshold=3)  # Pillow's defaults
RADII, AMOUNTS = (0.5, 0.8, 1.2, 1.8, 2.5, 3.5), (0.3, 0.6, 1.0, 1.5, 2.2, 3.2, 4.5)  # the oracle's grid: pixels, factor

Results = dict[str, dict[str, dict[str, Scores]]]  # degradation -> sharpener -> photo -> its scores


def main() -> None:
    parser = CliParser(__doc__)
    parser.add_argument("pairs", nargs="?", type=Path, help=f"folder of pairs, or of degradations ({DATA}/val)")
    parser.add_argument("weights", nargs="*", type=Path, help="more networks, besides student and teacher")
    parser.add_argument("--markdown", type=Path, help="file for the tables")
    parser.add_argument("--csv", type=Path, help="file for the scores of each photo")
    parser.add_argument("--picture", type=Path, help="file for a photo per degradation, that with the median gain")
    options = parser.parse_args()
    degradations = find_degradations(options.pairs or find_or_make_data(DATA) / "val")
    for name, suffixes in {"markdown": [".md"], "csv": [".csv"], "picture": [".png", ".jpg"]}.items():
        if (file := getattr(options, name)) is None:
            continue
        if file.suffix.lower() not in suffixes or file.is_dir() or file.name in ("blurry.png", "sharp.png"):
            raise UserError(f"--{name} {file}: name a file that ends in {' or '.join(suffixes)}, no folder and no input")
        check_writable(file.parent, f"--{name}")
    device = pick_device(DEVICE)
    files = {name: next(filter(os.path.isfile, choices), choices[-1]) for name, choices in NETWORKS.items()}
    files |= {str(file): file for file in options.weights}
    sharpeners = {name: Sharpener(load_model(file).requires_grad_(False), device) for name, file in files.items()}

    results: Results = {}
    pictures = []
    for degradation, folders in degradations.items():
        results[degradation], mask, example = score_degradation(degradation, folders, sharpeners)
        if options.picture:
            pictures.append(draw(f"{degradation}/{example.name}", example, mask, sharpeners))
    costs = {}
    for name, each in sharpeners.items():  # parameters, GMAC per megapixel, and ms per megapixel here
        time = ms_per_megapixel(each.network, each.device)
        costs[name] = [f"{count_parameters(each.network):,}", f"{gmac_per_megapixel(each.network):.1f}", f"{time:.0f}"]
    text = "\n\n".join(([degradation_table(results)] if len(results) > 1 else []) + [summary_table(results, costs)])
    print("\n".join(f"{name} is {file}" for name, file in files.items()), end="\n\n")
    print(text)
    if options.markdown:
        with atomic(options.markdown) as partial:
            partial.write_text(text + "\n", "utf-8")
    if options.csv:
        write_table(options.csv, [
            dict(degradation=degradation, photo=photo, sharpener=name, psnr=value.psnr, ssim=value.ssim)
            for degradation, scores in results.items() for name, each in scores.items() for photo, value in each.items()
        ])  # fmt: skip
    if options.picture:
        spaced = [np.pad(picture, ((0, 12), (0, 0), (0, 0)), constant_values=255) for picture in pictures]
        with atomic(options.picture) as partial:
            Image.fromarray(np.concatenate(spaced)).save(partial)


def find_degradations(pairs: Path) -> dict[str, list[Path]]:
    """Name of each degradation -> its folders of pairs; a folder that contains pairs itself is one degradation."""
    if not pairs.is_dir():
        raise UserError(f"{pairs} is not a folder: name one that contains NNN/blurry.png and NNN/sharp.png")
    inside = sorted(p for p in pairs.iterdir() if p.is_dir() and p.name[0] != "." and p.name not in SYSTEM_FOLDERS)
    has_degradations = any(any(path.glob("*/blurry.png")) for path in inside)
    if has_degradations and any(pairs.glob("*/blurry.png")):
        raise UserError(f"{pairs} contains both pairs and folders of pairs: name one of its folders")
    degradations = {path.name: find_pairs(path) for path in (inside if has_degradations else [pairs])}
    raise_problems([problem for folders in degradations.values() for folder in folders for problem in problems_of(folder)])
    return degradations


def problems_of(folder: Path) -> list[str]:
    """A sentence if a photo of the pair cannot be read or is of another size than the other."""
    try:
        (height, width), sharp = (upright_size(folder / name) for name in ("blurry.png", "sharp.png"))
    except UserError as error:
        return [str(error)]
    sizes = f"blurry.png is {width}x{height}, sharp.png is {sharp[1]}x{sharp[0]}"
    return [] if (height, width) == sharp else [f"{folder}: {sizes}: both must have the same size, crop or scale one"]


def score_degradation(
    degradation: str, folders: list[Path], sharpeners: dict[str, Sharpener]
) -> tuple[dict[str, dict[str, Scores]], tuple[float, float], Path]:
    """Scores of each sharpener on each photo, the best mask's setting, and the pair with the median gain of the first."""
    scores: dict[str, dict[str, Scores]] = {name: {} for name in (*BASELINES, *sharpeners)}
    grid: dict[tuple[float, float], list[float]] = {(radius, amount): [] for radius in RADII for amount in AMOUNTS}
    for folder in tqdm(folders, degradation, unit="photo", leave=False, disable=None):
        blurry, sharp = read_pair(folder)
        outputs = {"input": blurry, "unsharp": to_tensor(Image.fromarray(to_pixels(blurry)).filter(DEFAULT_MASK))}
        outputs |= {name: to_tensor(sharpener(to_pixels(blurry))) for name, sharpener in sharpeners.items()}
        for name, output in outputs.items():
            scores[name][folder.name] = score(output, sharp)
        for radius in RADII:
            detail = blurry - convolve(blurry, gaussian_kernel(radius))
            for amount in AMOUNTS:
                masked = quantize_8bit(blurry + amount * detail)
                grid[radius, amount].append(float(psnr(masked[None], sharp[None]).clamp(max=MAX_PSNR)))
    best = max(grid, key=lambda setting: np.mean(grid[setting]))
    for folder in folders:
        blurry, sharp = read_pair(folder)
        scores["best unsharp"][folder.name] = score(unsharp(blurry, *best), sharp)
    first = next(iter(sharpeners))
    by_gain = sorted(folders, key=lambda folder: scores[first][folder.name].ssim - scores["input"][folder.name].ssim)
    return scores, best, by_gain[len(by_gain) // 2]


def read_pair(folder: Path) -> tuple[Tensor, Tensor]:
    return tuple(to_tensor(read_photo(folder / name)) for name in ("blurry.png", "sharp.png"))


def unsharp(photo: Tensor, radius: float, amount: float) -> Tensor:
    """(3, H, W) plus ``amount`` times what a Gaussian blur of sigma ``radius`` removes, in 8 bits."""
    return quantize_8bit(photo + amount * (photo - convolve(photo, gaussian_kernel(radius))))


def draw(title: str, folder: Path, mask: tuple[float, float], sharpeners: dict[str, Sharpener]) -> Image.Image:
    blurry, sharp = read_pair(folder)
    masked, name = unsharp(blurry, *mask), f"unsharp mask {mask[0]:g}, {mask[1]:g}"
    outputs = {name: to_tensor(sharpener(to_pixels(blurry))) for name, sharpener in sharpeners.items()}
    return side_by_side({title: blurry, name: masked, **outputs, "sharp": sharp})


# Tables


def mean(scores: Iterable[Scores]) -> Scores:
    return Scores(*np.mean(list(scores), axis=0).tolist())


def degradation_table(results: Results) -> str:
    """PSNR / SSIM of each sharpener for each degradation."""
    rows = [["degradation", *next(iter(results.values()))]]
    for degradation, scores in results.items():
        means = [mean(each.values()) for each in scores.values()]
        rows.append([degradation, *(f"{value.psnr:.2f} / {value.ssim:.4f}" for value in means)])
    return as_markdown(rows)


def summary_table(results: Results, costs: dict[str, list[str]]) -> str:
    """The mean of each sharpener, its gain over the input, the share of the teacher's gain, and its cost."""
    rows = [["", "PSNR dB", "SSIM", "gain", "of the teacher's", "photos made worse", "worst photo"]]
    rows[0] += ["parameters", "GMAC/megapixel", "ms/megapixel"]
    names = list(next(iter(results.values())))
    means = {name: mean(mean(scores[name].values()) for scores in results.values()) for name in names}
    gains = {name: np.subtract(value, means["input"]) for name, value in means.items()}
    for name in names:
        row = [""] * 4
        if name != "input":
            share = " / ".join(map(share_of, gains[name], gains["teacher"])) if "teacher" in gains else ""
            each = {  # gain of each photo in dB
                f"{degradation}/{photo}" if len(results) > 1 else photo: scores[name][photo].psnr - blurry.psnr
                for degradation, scores in results.items()
                for photo, blurry in scores["input"].items()
            }
            worst = min(each, key=each.get)
            worse = f"{sum(value < 0 for value in each.values())} of {len(each)}"
            row = [f"{gains[name][0]:+.2f} dB / {gains[name][1]:+.4f}", share, worse, f"{worst} {each[worst]:+.2f} dB"]
        rows.append([name, f"{means[name].psnr:.2f}", f"{means[name].ssim:.4f}", *row, *costs.get(name, [""] * 3)])
    return as_markdown(rows)


def as_markdown(rows: list[list[str]]) -> str:
    rows = [[one_line(cell).replace("|", "\\|") for cell in row] for row in rows]  # names of folders may contain them
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


if __name__ == "__main__":
    run_cli(main)
