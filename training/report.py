"""What a training prints and draws: tables, curves, and validation photos side by side."""

import csv
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.utils.data import Dataset

from images.files import atomic_write
from inference import run_tiled
from models import load_model
from training.distributed import rank
from utils import Scores, autocast, count_parameters, ms_per_megapixel, psnr, quantize_8bit, ssim, to_pixels

COLORS = {"input": "#888888", "start": "#2ca02c", "student": "#d62728", "teacher": "#1f77b4"}
ZOOM = 4  # each pixel of the crop below a photo becomes a square of 4x4
PICTURES = 3  # comparison_1.png to comparison_3.png


def epoch_row(epoch: int, loss: float, seconds: float, scores: dict[str, Scores]) -> dict[str, float]:
    """A row of the table of epochs: "epoch", "loss", "seconds", and "NAME_psnr" (dB) and "NAME_ssim" for each network."""
    row = {"epoch": epoch, "loss": loss, "seconds": seconds}
    for name, value in scores.items():
        row |= {f"{name}_psnr": value.psnr, f"{name}_ssim": value.ssim}
    return row


def print_epoch(title: str, row: dict[str, float], scores: Scores, baselines: dict[str, Scores], better: bool) -> None:
    others = ", ".join(f"{key} {value.psnr:.2f} {value.ssim:.4f}" for key, value in baselines.items())
    print(
        f"{title}  loss {row['loss']:.6f}  {scores.psnr:.2f} dB  SSIM {scores.ssim:.4f}  ({others})"
        f"  {row['seconds']:.1f} s{'  best' if better else ''}",
        flush=True,
    )


def summarize(
    student: nn.Module,
    teacher: nn.Module,
    scores: dict[str, Scores],
    val_set: Dataset,
    device: torch.device,
    *,
    best_file: str | Path,
    outputs: str | Path,
    pairs: Path,
) -> None:
    """Load the best weights into ``student``; print the final table, draw pictures, and say what to do next."""
    if rank() != 0:
        return
    load_model(best_file, student)
    networks = {"student": student, "teacher": teacher}
    print_summary(networks, scores | {"student": Scores(**student.metadata["val"])}, device)
    draw_comparison(Path(outputs), val_set, networks, device)
    print(f"The best student is in {best_file}; pictures, curves and the table of epochs are in {outputs}/")
    print(f"Next: python sharpen.py PHOTO --weights {best_file}, or python evaluate.py {pairs}")


def print_summary(networks: dict[str, nn.Module], scores: dict[str, Scores], device: torch.device) -> None:
    """The final table: how good the student is, how much of the teacher's gain it kept, what each costs."""
    blurry, student, teacher = scores["input"], scores["student"], scores["teacher"]
    kept = [(s - b) / (t - b) if t > b else math.nan for s, b, t in zip(student, blurry, teacher, strict=True)]
    print(f"\n{'':8s} {'PSNR dB':>8s} {'SSIM':>7s}  {'gain kept':>11s} {'parameters':>11s} {'ms/megapixel':>13s}")
    print(f"{'input':8s} {blurry.psnr:8.2f} {blurry.ssim:7.4f}")
    for name, network in networks.items():
        share = f"{kept[0]:.0%} / {kept[1]:.0%}" if name == "student" else ""
        row = f"{name:8s} {scores[name].psnr:8.2f} {scores[name].ssim:7.4f}  {share:>11s}"
        print(f"{row} {count_parameters(network):11,d} {ms_per_megapixel(network, device):13.1f}")
    print("gain kept: the student's gain over the input as a share of the teacher's, in PSNR / SSIM\n")


def write_table(path: Path, rows: list[dict[str, float]]) -> None:
    """Write ``rows`` as CSV, a column for each key of the first."""

    def write(partial: Path) -> None:
        with open(partial, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)

    atomic_write(path, write)


def draw_curves(path: Path, history: list[dict[str, float]]) -> None:
    """SSIM and PSNR by epoch, a line for each network in ``history``, a list of ``epoch_row``."""
    picture = Image.new("RGB", (1040, 420), "white")
    names = [key.removesuffix("_ssim") for key in history[0] if key.endswith("_ssim")]
    for left, unit, digits in (0, "ssim", 3), (520, "psnr", 1):
        lines = {name: [row[f"{name}_{unit}"] for row in history] for name in names}
        title = "validation SSIM" if unit == "ssim" else "validation PSNR, dB"
        _draw_panel(ImageDraw.Draw(picture), left, title, lines, [row["epoch"] for row in history], digits)
    atomic_write(path, picture.save)


def _draw_panel(
    draw: ImageDraw.ImageDraw, left: int, title: str, lines: dict[str, list[float]], epochs: list[float], digits: int
) -> None:
    """One chart of 520x420 pixels, its left edge at ``left``."""
    font, x0, x1, y0, y1 = ImageFont.load_default(14), left + 70, left + 500, 350, 50
    values = [value for line in lines.values() for value in line]
    low, high = min(values), max(values)
    margin = max(0.08 * (high - low), 10**-digits)
    low, high = low - margin, high + margin

    def point(epoch: float, value: float) -> tuple[float, float]:
        position = (epoch - epochs[0]) / max(1, epochs[-1] - epochs[0])
        return x0 + position * (x1 - x0), y0 + (value - low) / (high - low) * (y1 - y0)

    draw.text((x0, 20), title, "black", font)
    for tick in np.linspace(low + margin, high - margin, 5):
        y = point(epochs[0], tick)[1]
        draw.line([(x0, y), (x1, y)], "#e0e0e0")
        draw.text((x0 - 8, y), f"{tick:.{digits}f}", "black", font, anchor="rm")
    for epoch in sorted({epochs[0], epochs[len(epochs) // 2], epochs[-1]}):
        draw.text((point(epoch, low)[0], y0 + 6), f"{epoch:.0f}", "black", font, anchor="mt")
    draw.text(((x0 + x1) / 2, y0 + 26), "epoch", "black", font, anchor="mt")
    draw.rectangle([x0, y1, x1, y0], outline="black")
    for i, (name, line) in enumerate(lines.items()):
        points = [point(epoch, value) for epoch, value in zip(epochs, line, strict=True)]
        color = COLORS.get(name, "black")
        draw.line(points, color, 2)
        for x, y in points:
            draw.ellipse([x - 2, y - 2, x + 2, y + 2], color)
        draw.line([(x0 + i * 130, 400), (x0 + i * 130 + 24, 400)], color, 3)
        draw.text((x0 + i * 130 + 30, 400), name, "black", font, anchor="lm")


@torch.no_grad()
def draw_comparison(folder: Path, val_set: Dataset, networks: dict[str, nn.Module], device: torch.device) -> None:
    """Write ``folder``/comparison_K.png, K = 1 to 3: blurry, each network and sharp side by side, and a magnified crop.

    The photos are from the blurrier half of ``val_set``, where there is something to see. Pictures of an earlier training
    with more photos are removed.
    """
    candidates = range(min(len(val_set), 100))
    by_blur = sorted(candidates, key=lambda i: float(psnr(val_set[i][0][None], val_set[i][1][None])))
    blurrier = by_blur[: max(1, (len(by_blur) + 1) // 2)]
    shown = blurrier[:: max(1, len(blurrier) // PICTURES)][:PICTURES]
    for k in range(1, PICTURES + 1):
        path = folder / f"comparison_{k}.png"
        if k > len(shown):
            path.unlink(missing_ok=True)
            continue
        blurry, sharp = val_set[shown[k - 1]]
        columns = {"blurry": blurry}
        for name, network in networks.items():
            with autocast(device):
                columns[name] = quantize_8bit(run_tiled(network.eval(), blurry[None].to(device)))[0].cpu()
        atomic_write(path, side_by_side({**columns, "sharp": sharp}, sharp).save)


def side_by_side(
    columns: dict[str, Tensor], sharp: Tensor, width: int = 360, zoom_on: tuple[Tensor, Tensor] | None = None
) -> Image.Image:
    """A picture with one column per image: name, PSNR and SSIM, the whole photo, a crop magnified four times.

    Args:
        columns: name -> (3, H, W) in [0, 1]; the first is the blurry photo.
        sharp: (3, H, W).
        width: of a column, in pixels.
        zoom_on: crop where these two images, (3, H, W) each, differ most; by default the first column and sharp.
    """
    height = max(1, round(width * sharp.shape[-2] / sharp.shape[-1]))
    crop = max(1, min(width // ZOOM, *sharp.shape[-2:]))
    rows, cols = _worst_window(*(zoom_on or (next(iter(columns.values())), sharp)), crop)
    head, gap, font = 44, 6, ImageFont.load_default(15)
    picture = Image.new("RGB", (len(columns) * (width + gap) - gap, head + height + gap + crop * ZOOM), "white")
    draw = ImageDraw.Draw(picture)
    for i, (name, image) in enumerate(columns.items()):
        x = i * (width + gap)
        draw.text((x + 2, 2), name, "black", font)
        if image is not sharp:
            scores = float(psnr(image[None], sharp[None])), float(ssim(image[None], sharp[None]))
            draw.text((x + 2, 22), f"{scores[0]:.2f} dB  SSIM {scores[1]:.4f}", "#555555", font)
        pixels = Image.fromarray(to_pixels(image))
        resample = Image.Resampling.LANCZOS if pixels.width > width else Image.Resampling.NEAREST
        picture.paste(pixels.resize((width, height), resample), (x, head))
        zoomed = pixels.crop((cols.start, rows.start, cols.stop, rows.stop))
        zoomed = zoomed.resize((crop * ZOOM, crop * ZOOM), Image.Resampling.NEAREST)  # pixels stay visible
        picture.paste(zoomed, (x, head + height + gap))
        corners = [(cols.start, rows.start), (cols.stop, rows.stop)]
        scale = width / sharp.shape[-1]
        draw.rectangle([(x + a * scale, head + b * scale) for a, b in corners], outline="yellow", width=2)
    return picture


def _worst_window(first: Tensor, second: Tensor, size: int) -> tuple[slice, slice]:
    """Rows and columns of the square of ``size`` pixels where two (3, H, W) images differ most."""
    error = (first - second).square().mean(0)[None, None].double()
    means = torch.nn.functional.avg_pool2d(error, size, stride=max(1, size // 8))[0, 0]
    top, left = (int(i) * max(1, size // 8) for i in np.unravel_index(int(means.argmax()), means.shape))
    return slice(top, top + size), slice(left, left + size)
