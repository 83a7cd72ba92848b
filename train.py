"""Distillation: a small student learns to sharpen photos as a large, trained teacher does.

    python train.py

learns from the pairs in data/, or from demo data where there are none. Edit the constants, then run.
"""

import csv
import math
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dataset import PairedImageDataset, find_or_make_data
from models import StudentCNN, TeacherCNN, count_parameters, load_model, save_model
from pictures import draw_comparison, draw_curves
from utils import (
    PERFECT,
    PSNRLoss,
    UserError,
    as_saved,
    autocast_dtype,
    ms_per_megapixel,
    pick_device,
    psnr,
    run_script,
    seed_everything,
    ssim,
    write_whole,
)

# Files
DATA = "data"  # holds train/NNN/{blurry,sharp}.png and val/NNN/{blurry,sharp}.png
TEACHER_WEIGHTS = "weights/teacher.pth"  # None: first teach a teacher on the training pairs
BEST_STUDENT = "best_student_model.pth"  # the student with the best validation SSIM
OUTPUTS = "outputs"  # table of the epochs, curves, pictures

# Training
NUM_EPOCHS = 20
PATCHES_PER_PHOTO = 16  # random patches of each training photo in one epoch
BATCH_SIZE = 8  # patches per step
PATCH_SIZE = 128  # pixels
LEARNING_RATE = 2e-3  # at its peak: it rises over the first 5% of the steps, then a cosine takes it to 0
SEED = 0  # the same seed gives the same weights on the same CPU

# Machine
DEVICE = "auto"  # "auto" is CUDA when there is one; or "cpu", "cuda:1", ...
NUM_WORKERS = 0  # processes that cut patches beside the training

# Safety
REQUIRE_GOOD_TEACHER = True  # stop if the teacher does not beat the blurry input on the validation pairs


class Scores(NamedTuple):
    """Means over the validation photos."""

    psnr: float  # dB
    ssim: float


def main() -> None:
    device = pick_device(DEVICE)
    data = find_or_make_data(DATA)
    train_set = PairedImageDataset(data / "train", PATCH_SIZE, SEED)
    val_set = PairedImageDataset(data / "val")
    print(f"{len(train_set)} training and {len(val_set)} validation pairs from {data}, on {device}")
    input_scores = validate(nn.Identity(), val_set, device)
    training = dict(
        train_set=train_set,
        val_set=val_set,
        device=device,
        outputs=Path(OUTPUTS),
        epochs=NUM_EPOCHS,
        steps=max(1, len(train_set) * PATCHES_PER_PHOTO // BATCH_SIZE),  # per epoch
        batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        workers=NUM_WORKERS,
    )

    seed_everything(SEED)
    if TEACHER_WEIGHTS is None:
        teacher_file = Path(OUTPUTS) / "teacher.pth"
        print(f"TEACHER_WEIGHTS is None: first a teacher learns from the sharp photos; it goes to {teacher_file}")
        fit("teacher", TeacherCNN().to(device), sharp_photo, PSNRLoss(), {"input": input_scores}, teacher_file, **training)
    else:
        teacher_file = Path(TEACHER_WEIGHTS)
    teacher = load_model(teacher_file).to(device).eval().requires_grad_(False)
    reference = {"input": input_scores, "teacher": validate(teacher, val_set, device)}
    check_teacher(reference, teacher_file, data, REQUIRE_GOOD_TEACHER)

    def teacher_output(blurry: Tensor, sharp: Tensor) -> Tensor:
        return teacher(blurry)

    seed_everything(SEED)
    student = StudentCNN().to(device)
    loss_fn = nn.MSELoss()
    fit("student", student, teacher_output, loss_fn, reference, Path(BEST_STUDENT), **training)

    student = load_model(BEST_STUDENT).to(device)
    print_summary(student, teacher, validate(student, val_set, device), reference, device)
    draw_comparison(Path(OUTPUTS), val_set, {"student": student, "teacher": teacher}, device)
    print(f"The best student is in {BEST_STUDENT}; pictures, curves and the table of the epochs are in {OUTPUTS}/")


def sharp_photo(blurry: Tensor, sharp: Tensor) -> Tensor:
    """The target of a network that learns from the truth instead of from a teacher."""
    return sharp


def check_teacher(reference: dict[str, Scores], file: Path, data: Path, required: bool) -> None:
    """A student cannot learn from a teacher what it does not know: stop before the time is spent."""
    blurry, teacher = reference["input"], reference["teacher"]
    print(f"input   {blurry.psnr:6.2f} dB  SSIM {blurry.ssim:.4f}\nteacher {teacher.psnr:6.2f} dB  SSIM {teacher.ssim:.4f}")
    if required and not (teacher.psnr > blurry.psnr and teacher.ssim > blurry.ssim):
        raise UserError(
            f"the teacher in {file} does not beat the blurry input on {data / 'val'} (PSNR {teacher.psnr:.2f} against "
            f"{blurry.psnr:.2f} dB, SSIM {teacher.ssim:.4f} against {blurry.ssim:.4f}): train one on these pairs with "
            "pretrain.py or TEACHER_WEIGHTS = None, or set REQUIRE_GOOD_TEACHER = False to distil from it all the same"
        )


def fit(
    name: str,
    network: nn.Module,
    target_of: Callable[[Tensor, Tensor], Tensor],
    loss_fn: nn.Module,
    reference: dict[str, Scores],
    best_file: Path,
    *,
    train_set: Dataset,
    val_set: Dataset,
    device: torch.device,
    outputs: Path,
    epochs: int,
    steps: int,
    batch_size: int,
    learning_rate: float,
    workers: int,
) -> None:
    """Train ``network`` to give ``target_of(blurry, sharp)`` for a blurry patch; keep the best by validation SSIM.

    Args:
        name: "student" or "teacher", for what is printed and the names of files in ``outputs``.
        reference: scores of other networks on ``val_set``, shown beside this one's.
        best_file: where ``models.save_model`` puts the best.
        train_set: item k is a (blurry, sharp) patch, for any k >= 0.
        steps: per epoch.
    Raises:
        UserError: if the loss is no longer a finite number; ``best_file`` keeps the best so far.
        SystemExit: after Ctrl-C, likewise.
    """
    network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, epochs * steps))
    loader = DataLoader(
        train_set,
        batch_size,
        sampler=range(epochs * steps * batch_size),
        num_workers=workers,
        pin_memory=device.type == "cuda",
    )
    batches = iter(loader)  # one stream for all epochs: workers go on cutting patches during validation
    history: list[dict[str, float]] = []
    best = Scores(-math.inf, -math.inf)
    try:
        for epoch in range(1, epochs + 1):
            start = time.perf_counter()
            title = f"{name} {epoch}/{epochs}"
            loss = train_one_epoch(network, target_of, loss_fn, batches, steps, optimizer, schedule, device, title)
            scores = validate(network, val_set, device)
            if scores.ssim > best.ssim:
                best = scores
                facts = dict(epoch=epoch, epochs=epochs, steps=epoch * steps, batch_size=batch_size)
                facts |= dict(learning_rate=learning_rate, val_psnr=scores.psnr, val_ssim=scores.ssim)
                save_model(best_file, network, **facts)
            row = {"epoch": epoch, "loss": loss, "seconds": time.perf_counter() - start}
            for key, value in {**reference, name: scores}.items():
                row |= {f"{key}_psnr": value.psnr, f"{key}_ssim": value.ssim}
            history.append(row)
            write_history(outputs / f"{name}_epochs.csv", history)
            draw_curves(outputs / f"{name}_curves.png", history)
            others = ", ".join(f"{key} {value.psnr:.2f} {value.ssim:.4f}" for key, value in reference.items())
            mark = "  best" if best is scores else ""
            print(
                f"{title}  loss {loss:.6f}  {scores.psnr:.2f} dB  SSIM {scores.ssim:.4f}  ({others})"
                f"  {row['seconds']:.1f} s{mark}",
                flush=True,
            )
    except KeyboardInterrupt:
        kept = f"the best so far, SSIM {best.ssim:.4f}, is in {best_file}" if history else "nothing was saved yet"
        print(f"\nStopped after {len(history)} of {epochs} epochs: {kept}")
        raise SystemExit(130) from None


def train_one_epoch(
    network: nn.Module,
    target_of: Callable[[Tensor, Tensor], Tensor],
    loss_fn: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    steps: int,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    device: torch.device,
    title: str,
) -> float:
    """Take ``steps`` steps; returns their mean loss. Networks in bfloat16 where that is native, the loss in float32."""
    network.train()
    dtype = autocast_dtype(device)
    total = torch.zeros((), device=device)
    bar = tqdm(islice(batches, steps), title, total=steps, unit="step", leave=False, disable=None)  # None: not in a log file
    for step, (blurry, sharp) in enumerate(bar, start=1):
        blurry = blurry.to(device, non_blocking=True, memory_format=torch.channels_last)
        sharp = sharp.to(device, non_blocking=True)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            with torch.no_grad():
                target = target_of(blurry, sharp)
            prediction = network(blurry)
        loss = loss_fn(prediction.float(), target.float())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        total += loss.detach()
        looked_at = step % 50 == 0 or step == steps  # not every step: reading a number waits for the GPU
        if looked_at and not math.isfinite(total.item()):
            raise UserError(
                f"the loss of {title} is no longer a finite number: lower LEARNING_RATE; the best so far is kept"
            )
    return total.item() / steps


@torch.no_grad()
def validate(network: nn.Module, val_set: Dataset, device: torch.device) -> Scores:
    """Mean PSNR and SSIM of what ``network`` makes of each blurry photo, as an 8-bit picture, against the sharp one.

    A photo that is perfect counts as 60 dB: its PSNR is infinite, and so would be every mean with it.
    """
    network.eval()
    dtype = autocast_dtype(device)
    total = torch.zeros(2, dtype=torch.float64)
    for blurry, sharp in val_set:
        blurry, sharp = blurry[None].to(device), sharp[None].to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            prediction = network(blurry)
        prediction = as_saved(prediction)
        total += torch.stack([psnr(prediction, sharp).clamp(max=PERFECT), ssim(prediction, sharp)]).flatten().cpu()
    return Scores(*(total / len(val_set)).tolist())


def warmup_cosine(step: int, steps: int) -> float:
    """Factor of the learning rate: up from 0 over the first 5% of ``steps``, then half a cosine down to 0."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


def write_history(path: Path, history: list[dict[str, float]]) -> None:
    def write(partial: Path) -> None:
        with open(partial, "w", newline="") as file:
            writer = csv.DictWriter(file, history[0])
            writer.writeheader()
            writer.writerows(history)

    write_whole(path, write)


def print_summary(
    student: nn.Module, teacher: nn.Module, scores: Scores, reference: dict[str, Scores], device: torch.device
) -> None:
    blurry, best = reference["input"], reference["teacher"]
    kept = [(s - b) / (t - b) if t > b else math.nan for s, b, t in zip(scores, blurry, best, strict=True)]
    print(f"\n{'':8s} {'PSNR dB':>8s} {'SSIM':>7s}  {'gain kept':>10s} {'parameters':>11s} {'ms/megapixel':>13s}")
    print(f"{'input':8s} {blurry.psnr:8.2f} {blurry.ssim:7.4f}")
    for name, network, values in ("student", student, scores), ("teacher", teacher, best):
        share = f"{kept[0]:.0%} / {kept[1]:.0%}" if network is student else ""
        speed = ms_per_megapixel(network, device)
        print(
            f"{name:8s} {values.psnr:8.2f} {values.ssim:7.4f}  {share:>10s} {count_parameters(network):11,d} {speed:13.1f}"
        )
    print("gain kept: the student's share of what the teacher gains over the input, in PSNR / SSIM\n")


if __name__ == "__main__":
    run_script(main)
