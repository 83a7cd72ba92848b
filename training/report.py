"""What a training prints and draws: tables, curves, and validation photos side by side."""

import csv
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from dataset import PairedImageDataset
from images.files import atomic
from inference import Sharpener
from models import load_model
from training.distributed import rank
from utils import MAX_PSNR, Scores, count_parameters, ms_per_megapixel, print0, psnr, ssim, to_pixels, to_tensor

COLORS = {"input": "#888888", "start": "#2ca02c", "student": "#d62728", "teacher": "#1f77b4"}
PICTURES = 3  # comparison_1.png to comparison_3.png
COLUMN = 360  # width of a photo in them, in pixels
ZOOM = 4  # each pixel of the crop below a photo becomes a square of 4x4


def summarize(run, teacher: nn.Module, val_set: PairedImageDataset) -> None:
    """End a student's ``TrainingRun``: load its best weights, print the final table, draw pictures, say what to do next."""
    if rank() == 0:
        networks = {"student": load_model(run.best_file, run.network), "teacher": teacher}
        print_summary(networks, run.baselines | {"student": run.best}, run.device)
        draw_comparison(run, val_set, networks)
        next_step = f"python sharpen.py PHOTO --weights {run.best_file}, or python evaluate.py {val_set.root}"
        recommend(run, next_step, drawn="pictures, curves")


def recommend(run, next_step: str, drawn: str = "curves") -> None:
    """Say where the results of a ``TrainingRun`` are, and what to do next if they are any good."""
    print0(f"The best {run.name} is in {run.best_file}; {drawn} and the table of epochs are in {run.outputs}/")
    if "start" in run.baselines and run.best.ssim <= run.baselines["start"].ssim:
        print0(f"The {run.name} does not beat the one it started from: keep that, or train longer or on more photos")
    if run.best.beats(run.baselines["input"]):
        print0(f"Next: {next_step}")
    else:
        print0(f"The {run.name} does not beat the blurry input in PSNR and SSIM: train it longer or on more photos")


def print_summary(networks: dict[str, nn.Module], scores: dict[str, Scores], device: torch.device) -> None:
    """The final table: how good the student is, how much of the teacher's gain it kept, what each costs."""
    blurry, student, teacher = scores["input"], scores["student"], scores["teacher"]
    kept = " / ".join(share_of(s - b, t - b) for s, b, t in zip(student, blurry, teacher, strict=True))
    print(f"\n{'':8s} {'PSNR dB':>8s} {'SSIM':>7s}  {'gain kept':>11s} {'parameters':>11s} {'ms/megapixel':>13s}")
    print(f"{'input':8s} {blurry.psnr:8.2f} {blurry.ssim:7.4f}")
    for name, network in networks.items():
        row = f"{name:8s} {scores[name].psnr:8.2f} {scores[name].ssim:7.4f}  {kept if name == 'student' else '':>11s}"
        print(f"{row} {count_parameters(network):11,d} {ms_per_megapixel(network, device):13.1f}")
    print("gain kept: the student's gain over the input as a share of the teacher's, in PSNR / SSIM\n")


def share_of(gain: float, teachers: float) -> str:
    """In percent; a dash where the teacher has gained nothing that could be shared."""
    return f"{gain / teachers:.0%}" if teachers > 0 else "-"


def write_table(path: Path, rows: list[dict]) -> None:
    """Write ``rows`` as CSV, a column for each key of the first."""
    with atomic(path) as partial, open(partial, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def draw_curves(path: Path, history: list[dict[str, float]]) -> None:
    """SSIM and PSNR by epoch, a line for each network in ``TrainingRun.history``."""
    picture = Image.new("RGB", (1040, 420), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    top, bottom, last = 50, 350, len(history) - 1
    for left, unit, title, digits in (70, "_ssim", "SSIM by epoch", 3), (590, "_psnr", "PSNR by epoch, dB", 1):
        right = left + 430
        lines = {key.removesuffix(unit): [row[key] for row in history] for key in history[0] if key.endswith(unit)}
        low, high = min(map(min, lines.values())), max(map(max, lines.values()))
        margin = max(0.08 * (high - low), 10**-digits)
        scale = [low - margin, high + margin], [bottom, top]
        xs = np.linspace(left, right, last + 1)
        draw.text((left, 20), f"validation {title}", "black", font)
        for value in np.linspace(low, high, 5):
            y = np.interp(value, *scale)
            draw.line([left, y, right, y], "#e0e0e0")
            draw.text((left - 8, y), f"{value:.{digits}f}", "black", font, anchor="rm")
        draw.rectangle([left, top, right, bottom], outline="black")
        for epoch in {0, last // 2, last}:
            draw.text((xs[epoch], bottom + 6), f"{epoch + 1}", "black", font, anchor="mt")
        for x, (name, values) in zip(range(left, right, 130), lines.items(), strict=False):
            points, color = list(zip(xs, np.interp(values, *scale), strict=True)), COLORS.get(name, "black")
            draw.line(points, color, 2)
            for point in points:  # a single epoch has no line
                draw.circle(point, 2, color)
            draw.text((x, 400), name, color, font, anchor="lm")
    with atomic(path) as partial:
        picture.save(partial)


def draw_comparison(run, val_set: PairedImageDataset, networks: dict[str, nn.Module]) -> None:
    """Write comparison_K.png to the outputs of a ``TrainingRun``, K = 1 to 3: blurry, each network and sharp, side by side.

    Below them is a magnified crop. The photos are from the blurrier half of ``val_set``, where there is something to see.
    """
    by_blur = sorted(range(min(len(val_set), 100)), key=lambda index: score(*val_set[index]).psnr)
    blurrier = by_blur[: (len(by_blur) + 1) // 2]
    shown = blurrier[:: max(1, len(blurrier) // PICTURES)][:PICTURES]
    sharpeners = {name: Sharpener(network, run.device) for name, network in networks.items()}
    for k, index in enumerate(shown, start=1):
        blurry, sharp = val_set[index]
        outputs = {name: to_tensor(sharpener(to_pixels(blurry))) for name, sharpener in sharpeners.items()}
        picture = side_by_side({"blurry": blurry, **outputs, "sharp": sharp})
        with atomic(run.outputs / f"comparison_{k}.png") as partial:
            picture.save(partial)
        if run.writer:
            run.writer.add_image(f"comparison_{k}", np.array(picture), dataformats="HWC")


def side_by_side(columns: dict[str, Tensor]) -> Image.Image:
    """A picture with one column per image: name, PSNR and SSIM, the whole photo, a crop magnified four times.

    The images are (3, H, W) in [0, 1]; the first is blurry and the last sharp, and the crop is where these differ most.
    """
    blurry, *_, sharp = columns.values()
    height, width = sharp.shape[-2:]
    crop = min(COLUMN // ZOOM, height, width)
    error, stride = (blurry - sharp).square().mean(0, keepdim=True).double(), max(1, crop // 8)
    means = F.avg_pool2d(error, crop, stride)[0]
    top, left = (stride * int(i) for i in np.unravel_index(int(means.argmax()), means.shape))
    box = left, top, left + crop, top + crop
    shown = COLUMN, max(1, round(COLUMN * height / width))
    head, gap, font = 44, 6, ImageFont.load_default(15)
    picture = Image.new("RGB", (len(columns) * (COLUMN + gap) - gap, head + shown[1] + gap + crop * ZOOM), "white")
    draw = ImageDraw.Draw(picture)
    for x, (name, image) in zip(range(0, picture.width, COLUMN + gap), columns.items(), strict=True):
        draw.text((x + 2, 2), name, "black", font)
        if image is not sharp:
            draw.text((x + 2, 22), str(score(image, sharp)), "#555555", font)
        photo = Image.fromarray(to_pixels(image))
        resample = Image.Resampling.LANCZOS if width > COLUMN else Image.Resampling.NEAREST
        picture.paste(photo.resize(shown, resample), (x, head))
        zoomed = photo.resize((crop * ZOOM, crop * ZOOM), Image.Resampling.NEAREST, box)  # pixels stay visible
        picture.paste(zoomed, (x, head + shown[1] + gap))
        frame = np.array(box) * COLUMN / width + [x, head, x, head]
        draw.rectangle(frame.tolist(), outline="yellow", width=2)
    return picture


def score(image: Tensor, sharp: Tensor) -> Scores:
    """PSNR in dB, at most 50, and SSIM of one photo, (3, H, W)."""
    return Scores(min(float(psnr(image[None], sharp[None])), MAX_PSNR), float(ssim(image[None], sharp[None])))
