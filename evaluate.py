"""Compares sharpeners on pairs of photos: how good each is, what it gains over the blurry input, what it costs.

    python evaluate.py                                      the validation pairs in data/val
    python evaluate.py PAIRS other.pth --picture best.png   PAIRS/NNN/{blurry,sharp}.png or PAIRS/DEGRADATION/NNN/...

The unsharp mask is listed at Pillow's default setting and as an oracle: the best of a grid of settings, tuned for each
degradation on the ground truth. Scores are of 8-bit images; a mean over degradations counts each of them once.
"""

import argparse
import csv
import math
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter
from torch import Tensor
from tqdm import tqdm

from blur.filters import convolve, gaussian_kernel
from cli import CliParser, check_writable, run_cli
from dataset import find_pairs
from images.demo_data import find_or_make_data
from images.files import atomic_write
from images.photos import read_photo
from images.pictures import FORMATS
from inference import Sharpener
from models import load_model
from training.report import side_by_side
from utils import (
    Scores,
    UserError,
    count_parameters,
    gmac_per_megapixel,
    ms_per_megapixel,
    one_line,
    pick_device,
    psnr,
    quantize_8bit,
    ssim,
    to_pixels,
    to_tensor,
)

DATA = "data"  # its val/ is scored unless another folder is named; without pairs, the demo data
NETWORKS = {  # the first file that exists
    "student": ("best_student_model.pth", Path(__file__).parent / "weights" / "student.pth"),
    "teacher": (Path(__file__).parent / "weights" / "teacher.pth",),
}
DEVICE = "auto"  # CUDA if available; or "cpu", "cuda:1", ...
DEFAULT_MASK = ImageFilter.UnsharpMask(radius=2, percent=150, threshold=3)  # Pillow's defaults
RADII, AMOUNTS = (0.5, 0.8, 1.2, 1.8, 2.5, 3.5), (0.3, 0.6, 1.0, 1.5, 2.2, 3.2, 4.5)  # the oracle's grid: pixels, factor

Results = dict[str, dict[str, list[Scores]]]  # degradation -> sharpener -> scores of each photo


def main() -> None:
    parser = CliParser(__doc__)
    parser.add_argument("pairs", nargs="?", type=Path, help=f"folder of pairs, or of degradations ({DATA}/val)")
    parser.add_argument("weights", nargs="*", type=Path, help="more networks, besides student and teacher")
    parser.add_argument("--markdown", type=Path, help="file for the tables")
    parser.add_argument("--csv", type=Path, help="file for the scores of each photo")
    parser.add_argument("--picture", type=Path, help="file for a photo per degradation, where student and mask differ most")
    options = parser.parse_args()
    degradations = find_degradations(options.pairs or find_or_make_data(DATA) / "val")
    check_results(options, [file for folders in degradations.values() for folder in folders for file in folder.iterdir()])
    device = pick_device(DEVICE)
    files = {name: next((f for f in map(Path, files) if f.is_file()), None) for name, files in NETWORKS.items()}
    for name in [name for name, file in files.items() if file is None]:
        print(f"there is no {name} ({' or '.join(map(str, NETWORKS[name]))}): it is skipped")
    for file in dict.fromkeys(options.weights):
        name = str(file).removesuffix(file.suffix)
        if any(other and os.path.realpath(other) == os.path.realpath(file) for other in files.values()):
            continue  # it is scored under its usual name
        files[str(file) if name in ("input", "unsharp", "best unsharp") or files.get(name) else name] = file
    files = {name: file for name, file in files.items() if file}
    sharpeners = {name: Sharpener(load_model(file).requires_grad_(False), device) for name, file in files.items()}

    results: Results = {}
    pictures = []
    for degradation, folders in degradations.items():
        results[degradation], picture = score_degradation(degradation, folders, sharpeners)
        pictures.append(picture)
    costs = {name: costs_of(sharpener) for name, sharpener in sharpeners.items()}
    names = {degradation: [folder.name for folder in folders] for degradation, folders in degradations.items()}
    text = "\n\n".join(([degradation_table(results)] if len(results) > 1 else []) + [summary_table(results, names, costs)])
    print("\n".join(f"{name} is {file}" for name, file in files.items()), end="\n\n")
    print(f"{text}\n\n{losses(results, names)}")
    if options.markdown:
        atomic_write(options.markdown, lambda partial: partial.write_text(text + "\n", "utf-8"))
    if options.csv:
        write_csv(options.csv, results, names)
    if options.picture:
        tall = Image.new("RGB", (max(p.width for p in pictures), sum(p.height + 12 for p in pictures)), "white")
        for i, picture in enumerate(pictures):
            tall.paste(picture, (0, sum(p.height + 12 for p in pictures[:i])))
        atomic_write(options.picture, tall.save)


def check_results(options: argparse.Namespace, inputs: list[Path]) -> None:
    """Raise ``UserError`` if a result could not be written after the work, or would overwrite an input."""
    weights = [*options.weights, *(file for files in NETWORKS.values() for file in files)]
    taken = {os.path.realpath(file) for file in (*inputs, *weights)}
    kinds = {"--markdown": (options.markdown, ()), "--csv": (options.csv, ()), "--picture": (options.picture, FORMATS)}
    for name, (file, suffixes) in kinds.items():
        if file is None:
            continue
        if os.path.realpath(file) in taken or file.is_dir():
            raise UserError(f"{name} {file} is an input, another result or a folder: name another file")
        taken.add(os.path.realpath(file))
        if suffixes and file.suffix.lower() not in suffixes:
            raise UserError(f"{name} {file} does not end in one of {', '.join(suffixes)}")
        check_writable(file.parent, name)


def find_degradations(pairs: Path) -> dict[str, list[Path]]:
    """Name of each degradation -> its folders of pairs; a folder that contains pairs itself is one degradation."""
    if not pairs.is_dir():
        raise UserError(f"{pairs} is not a folder: name one that contains NNN/blurry.png and NNN/sharp.png")
    inside = sorted(path for path in pairs.iterdir() if path.is_dir() and not path.name.startswith("."))
    degradations = [path for path in inside if any(path.glob("*/blurry.png"))]
    if degradations and any(pairs.glob("*/blurry.png")):
        raise UserError(f"{pairs} contains both pairs and folders of pairs: name one of its folders")
    return {path.name: find_pairs(path) for path in degradations or [pairs]}


def score_degradation(
    degradation: str, folders: list[Path], sharpeners: dict[str, Sharpener]
) -> tuple[dict[str, list[Scores]], Image.Image]:
    """Scores of each sharpener on each photo, and a picture of the one where student and default mask differ most."""
    scores: dict[str, list[Scores]] = {name: [] for name in ("input", "unsharp", "best unsharp", *sharpeners)}
    grid: dict[tuple[float, float], list[float]] = {(r, a): [] for r in RADII for a in AMOUNTS}
    shown, largest = folders[0], 0.0
    for folder in tqdm(folders, degradation, unit="photo", leave=False, disable=None):
        blurry, sharp = read_pair(folder)
        masked = default_unsharp(blurry)
        scores["input"].append(score(blurry, sharp))
        scores["unsharp"].append(score(masked, sharp))
        for radius in RADII if math.isfinite(scores["input"][-1].psnr) else ():  # else any change is a loss
            detail = blurry - convolve(blurry, gaussian_kernel(radius))
            for amount in AMOUNTS:
                grid[radius, amount].append(float(psnr(quantize_8bit(blurry + amount * detail)[None], sharp[None])))
        for i, (name, sharpener) in enumerate(sharpeners.items()):
            sharpened = run(sharpener, blurry)
            scores[name].append(score(sharpened, sharp))
            apart = float((sharpened - masked).abs().mean())
            if i == 0 and apart > largest:
                shown, largest = folder, apart
    best = max(grid, key=lambda setting: np.mean(grid[setting] or [0]))
    for folder in folders:
        blurry, sharp = read_pair(folder)
        scores["best unsharp"].append(score(unsharp(blurry, *best), sharp))
    return scores, draw(degradation, shown, best, sharpeners)


def read_pair(folder: Path) -> tuple[Tensor, Tensor]:
    blurry, sharp = (to_tensor(read_photo(folder / f"{name}.png")) for name in ("blurry", "sharp"))
    if blurry.shape != sharp.shape:
        raise UserError(f"{folder}: blurry.png and sharp.png differ in size: both must show the same pixels")
    return blurry, sharp


def default_unsharp(photo: Tensor) -> Tensor:
    """(3, H, W) -> same, by Pillow."""
    return to_tensor(np.array(Image.fromarray(to_pixels(photo)).filter(DEFAULT_MASK)))


def unsharp(photo: Tensor, radius: float, amount: float) -> Tensor:
    """(3, H, W) plus ``amount`` times what a Gaussian blur of sigma ``radius`` removes, in 8 bits."""
    return quantize_8bit(photo + amount * (photo - convolve(photo, gaussian_kernel(radius))))


def run(sharpener: Sharpener, photo: Tensor) -> Tensor:
    """What sharpen.py would save: (3, H, W) -> same."""
    return to_tensor(sharpener(to_pixels(photo)))


def score(image: Tensor, sharp: Tensor) -> Scores:
    return Scores(float(psnr(image[None], sharp[None])), float(ssim(image[None], sharp[None])))


def draw(degradation: str, folder: Path, best: tuple[float, float], sharpeners: dict[str, Sharpener]):
    blurry, sharp = read_pair(folder)
    columns = {f"{degradation}/{folder.name}": blurry, f"unsharp mask {best[0]:g}, {best[1]:g}": unsharp(blurry, *best)}
    columns |= {name: run(sharpener, blurry) for name, sharpener in sharpeners.items()}
    return side_by_side(
        {**columns, "sharp": sharp}, sharp, zoom_on=tuple(list(columns.values())[1:3]) if sharpeners else None
    )


def costs_of(sharpener: Sharpener) -> tuple[str, str, str]:
    """Parameters, GMAC per megapixel, and ms per megapixel here."""
    network, time = sharpener.network, ms_per_megapixel(sharpener.network, sharpener.device)
    return f"{count_parameters(network):,}", f"{gmac_per_megapixel(network):.1f}", f"{time:.0f}"


# Tables


def means(results: Results, name: str) -> Scores:
    """Of a sharpener over the photos of each degradation, then over the degradations with something to sharpen, if any."""
    blurry = [scores for scores in results.values() if not is_perfect(scores)]
    return Scores(*np.mean([mean_scores(scores, name) for scores in blurry or results.values()], axis=0).tolist())


def is_perfect(scores: dict[str, list[Scores]]) -> bool:
    return all(math.isinf(s.psnr) for s in scores["input"])


def mean_scores(scores: dict[str, list[Scores]], name: str) -> Scores:
    """Over the photos that are not perfect already (infinite PSNR); over all if all are perfect."""
    counted = [s for s, blurry in zip(scores[name], scores["input"], strict=True) if math.isfinite(blurry.psnr)]
    return Scores(*np.mean(counted or scores[name], axis=0).tolist())


def degradation_table(results: Results) -> str:
    """PSNR / SSIM of each sharpener for each degradation."""
    names = list(next(iter(results.values())))
    rows = [["degradation", *names]]
    for degradation, scores in results.items():
        rows.append([degradation, *(f"{p:.2f} / {s:.4f}" for p, s in (mean_scores(scores, name) for name in names))])
    return as_markdown(rows)


def summary_table(results: Results, names: dict[str, list[str]], costs: dict[str, tuple[str, str, str]]) -> str:
    """The mean of each sharpener, its gain over the input, the share of the teacher's gain, and its cost."""
    blurry, teacher = means(results, "input"), None
    if "teacher" in costs and math.isfinite(blurry.psnr):
        teacher = np.subtract(means(results, "teacher"), blurry)
    head = ["", "PSNR dB", "SSIM", "gain", "of the teacher's", "photos made worse", "worst photo"]
    rows = [[*head, "parameters", "GMAC/megapixel", "ms/megapixel"]]
    for name in next(iter(results.values())):
        mean = means(results, name)
        row = [name, f"{mean.psnr:.2f}", f"{mean.ssim:.4f}"]
        if name != "input" and math.isfinite(blurry.psnr):  # else there was nothing to gain
            gain, each = np.subtract(mean, blurry), gains(results, names, name)
            row.append(f"{gain[0]:+.2f} dB / {gain[1]:+.4f}")
            row.append("" if teacher is None else " / ".join(f"{g / t:.0%}" for g, t in zip(gain, teacher, strict=True)))
            row.append(f"{sum(g < 0 for g in each.values())} of {len(each)}")
            worst = min(each, key=each.get, default="")
            row.append(f"{worst} {each[worst]:+.2f} dB" if each else "")
        row += [""] * (len(head) - len(row))
        row += costs.get(name, ())
        rows.append(row + [""] * (len(rows[0]) - len(row)))
    return as_markdown(rows)


def gains(results: Results, names: dict[str, list[str]], name: str) -> dict[str, float]:
    """Photo -> gain in dB of a sharpener, without photos that are perfect already."""
    each = {}
    for degradation, scores in results.items():
        for photo, blurry, sharpened in zip(names[degradation], scores["input"], scores[name], strict=True):
            if math.isfinite(blurry.psnr):
                each[f"{degradation}/{photo}" if len(results) > 1 else photo] = sharpened.psnr - blurry.psnr
    return each


def losses(results: Results, names: dict[str, list[str]], shown: int = 12) -> str:
    """Which photos the networks made worse, the worst first."""
    lines = []
    for name in list(next(iter(results.values())))[3:]:
        worse = sorted((gain, photo) for photo, gain in gains(results, names, name).items() if gain < 0)
        if worse:
            more = f" and {len(worse) - shown} more" if len(worse) > shown else ""
            lines.append(f"{name} made worse: " + ", ".join(f"{one_line(p)} ({g:+.2f} dB)" for g, p in worse[:shown]) + more)
    return "\n".join(lines) or "no network made a photo worse"


def as_markdown(rows: list[list[str]]) -> str:
    rows = [[one_line(cell).replace("|", "\\|") for cell in row] for row in rows]  # names of folders may hold them
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def write_csv(path: Path, results: Results, names: dict[str, list[str]]) -> None:
    """A row for each degradation, photo and sharpener."""

    def write(partial: Path) -> None:
        with open(partial, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            writer = csv.writer(file)
            writer.writerow(["degradation", "photo", "sharpener", "psnr", "ssim"])
            for degradation, scores in results.items():
                for name, each in scores.items():
                    writer.writerows(
                        [degradation, photo, name, *s] for photo, s in zip(names[degradation], each, strict=True)
                    )

    atomic_write(path, write)


if __name__ == "__main__":
    run_cli(main)
