"""The training loop."""

import math

import time

from collections.abc import Callable, Iterator

from pathlib import Path

import torch

from torch import Tensor, nn

from torch.utils.data import Dataset

from tqdm import tqdm

from checkpoints import (
    Stopwatch,
    lock_output_dir,
    fingerprint,
    load_progress,
    make_way,
    mark_finished,
    save_progress,
    teacher_is_ready,
    unfinished,
)

from checks import check_compiler, check_constants, check_network, check_targets

from dataset import PairedImageDataset, batches_of_one_size, find_or_make_data, find_pairs, start_batches

from training.estimator import train_estimator

from models import StudentCNN, TeacherCNN, load_model, run_tiled, save_model, share_estimator

from processes import (
    wrap_distributed,
    main_process_first,
    all_reduce_mean,
    rank,
    free_gpu_memory,
    print0,
    per_rank_batch_size,
    init_distributed,
    all_reduce_sum,
    world_size,
)

from report import draw_comparison, draw_curves, epoch_row, print_epoch, print_summary, write_table

from utils import (
    PERFECT,
    PSNRAndSSIMLoss,
    Scores,
    UserError,
    quantize_8bit,
    autocast,
    psnr,
    run_cli,
    seed_everything,
    ssim,
)

import bisect

import inspect

import itertools

import os

import shutil

import zlib

from collections.abc import Iterable, Iterator, Sequence

from pathlib import Path

import numpy as np

import skimage

import torch

from PIL import Image

from torch import Tensor, nn

from torch.utils.data import DataLoader, Dataset

from tqdm import tqdm

import estimator

from checkpoints import fingerprint

from degradations import Mixture, random_degradation

from files import growing_file, read_torch_file, write_torch_file, atomic_write

from estimator import log_power_spectrum, transform_spectrum

from models import run_tiled

from patches import as_batch, crop_and_augment, sample_index, generator_of, random_window, to_pixels, to_tensor

from photos import DecodedPhotos, PixelFile, list_problems, read_photo, remove_files

from processes import rank, print0, per_rank_batch_size

from utils import UserError, autocast, autocast_dtype

def as_given(blurry: Tensor, target: Tensor, spectrum: Tensor) -> Tensor:
    """The target that comes with the patches: the sharp photo or, once the teacher was asked, what it answered."""
    return target

def check_teacher(scores: dict[str, Scores], file: Path, data: Path, required: bool) -> None:
    """A student cannot learn from a teacher what it does not know: stop before the time is spent."""
    blurry, teacher = scores["input"], scores["teacher"]
    print0(f"input   {blurry.psnr:6.2f} dB  SSIM {blurry.ssim:.4f}\nteacher {teacher.psnr:6.2f} dB  SSIM {teacher.ssim:.4f}")
    if required and not (teacher.psnr > blurry.psnr and teacher.ssim > blurry.ssim):
        raise UserError(
            f"the teacher in {file} does not beat the blurry input on {data / 'val'} (PSNR {teacher.psnr:.2f} against "
            f"{blurry.psnr:.2f} dB, SSIM {teacher.ssim:.4f} against {blurry.ssim:.4f}): train one on these pairs with "
            "pretrain.py or TEACHER_WEIGHTS = None, or set REQUIRE_GOOD_TEACHER = False to distil from it all the same"
        )

def fit(
    name: str,
    network: nn.Module,
    target_of: Callable[..., Tensor],
    loss_fn: nn.Module,
    train_set: Dataset,
    val_set: Dataset,
    reference: dict[str, Scores],
    best_file: Path,
    settings: dict,
    *,
    device: torch.device,
    outputs: Path,
    workers: int,
    compiled: bool,
    checkpoint_minutes: float,
    resume: bool,
) -> None:
    """Train ``network`` to give ``target_of(*batch)`` for the blurry patches of a batch; keep the best by SSIM.

    Args:
        name: "student" or "teacher", for what is printed and the names of files in ``outputs``.
        target_of: takes what ``train_set.batch`` gives: blurry patches and targets, (N, 3, S, S) each, and descriptions.
        train_set: has ``batch(items)`` for any items >= 0, a length in photos, and a ``key`` that tells its photos.
        reference: scores of others on ``val_set``, shown beside this one's.
        best_file: where ``models.save_model`` puts the network with the best SSIM on ``val_set``.
        settings: the constants of a training by their names; what an interrupted one must share to go on.
    Raises:
        UserError: if an interrupted training cannot be taken up, the loss is no longer a finite number (the best so
            far is kept), or a file cannot be written.
        SystemExit: after Ctrl-C; the best so far is kept.
    """
    epochs, batch_size = settings["NUM_EPOCHS"], settings["BATCH_SIZE"]
    steps = max(1, len(train_set) * settings["PATCHES_PER_PHOTO"] // batch_size)  # per epoch
    network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), settings["LEARNING_RATE"], weight_decay=1e-4, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, epochs * steps))

    last_file = outputs / ("last.pth" if name == "student" else f"last_{name}.pth")
    parts = {"network": network, "optimizer": optimizer, "schedule": schedule}
    settings = settings | {"the photos": f"{train_set.key} {val_set.key}", "the loss": repr(loss_fn)}
    settings |= {"the network": f"{type(network).__name__} {getattr(network, 'arguments', '')}"}
    progress = dict(step=0, loss_sum=0.0, history=[], best_ssim=-math.inf)
    if resume and unfinished(last_file):
        progress = load_progress(last_file, parts, settings)
        if progress["history"] and not best_file.is_file():
            raise UserError(f"{best_file} is gone, the best of an interrupted training: put it back or set RESUME = False")
        print0(f"going on with the training that was interrupted after step {progress['step']} of {epochs * steps}")
    batches = start_batches(train_set, device, range(progress["step"], epochs * steps), batch_size, workers)
    if compiled:
        network.compile()  # in place: the names of the weights stay as they are
    trained = wrap_distributed(network, device)
    if rank() == 0:  # at once, so that a folder that cannot be written is known before the work
        save_progress(last_file, parts, settings, progress)
    stopwatch = Stopwatch(checkpoint_minutes)

    def keep(steps_done: int, loss_sum: float) -> None:
        if rank() == 0 and stopwatch.rings():
            now = {"step": len(progress["history"]) * steps + steps_done, "loss_sum": loss_sum}
            save_progress(last_file, parts, settings, progress | now)

    try:
        while progress["step"] < epochs * steps:
            start, epoch = time.perf_counter(), progress["step"] // steps + 1
            title, todo = f"{name} {epoch}/{epochs}", range(progress["step"] % steps, steps)
            loss = train_one_epoch(
                trained, target_of, loss_fn, batches, optimizer, schedule, device, title, todo, progress["loss_sum"], keep
            )
            scores = validate(network, val_set, device)
            if not math.isfinite(loss + scores.psnr + scores.ssim):
                last_file.unlink(missing_ok=True)  # going on from it would only lead here again
                kept = f"{best_file} holds the best so far" if epoch > 1 else "nothing was saved"
                raise UserError(f"the loss of {title} is no longer a finite number: lower LEARNING_RATE; {kept}")
            row = epoch_row(epoch, loss, time.perf_counter() - start, reference | {name: scores})
            better = scores.ssim > progress["best_ssim"]
            best_ssim = max(scores.ssim, progress["best_ssim"])
            history = [*progress["history"], row]
            progress = dict(step=epoch * steps, loss_sum=0.0, history=history, best_ssim=best_ssim)
            if rank() == 0:
                if better:
                    save_model(best_file, network, epoch=epoch, val=scores._asdict(), settings=settings)
                write_table(outputs / f"{name}_epochs.csv", history)
                draw_curves(outputs / f"{name}_curves.png", history)
                save_progress(last_file, parts, settings, progress)
                print_epoch(title, row, scores, reference, better)
    except KeyboardInterrupt:
        done, best = len(progress["history"]), progress["best_ssim"]
        kept = f"the best so far, SSIM {best:.4f}, is in {best_file}" if done else "nothing to keep yet"
        print0(f"\nStopped after {done} of {epochs} epochs: {kept}. Run again to go on.")
        raise SystemExit(130) from None

def train_one_epoch(
    network: nn.Module,
    target_of: Callable[..., Tensor],
    loss_fn: nn.Module,
    batches: Iterator[list[Tensor]],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    device: torch.device,
    title: str,
    todo: range,
    loss_sum: float,
    keep: Callable[[int, float], None],
) -> float:
    """Take the steps ``todo`` of one epoch, after others whose losses add up to ``loss_sum``.

    The networks run in bfloat16 where that is native, the loss is taken in float32.

    Returns:
        the mean loss of the epoch; at once, if it is no longer finite.
    """
    network.train()
    told = hasattr(getattr(network, "module", network), "describe")  # a network that wants to know the whole photo
    total = torch.full((), loss_sum, device=device)
    hidden = None if rank() == 0 else True  # None: on a terminal, not in a log file
    for step in tqdm(todo, title, initial=todo.start, total=todo.stop, unit="step", leave=False, disable=hidden):
        blurry, target, spectrum = (part.to(device, non_blocking=True) for part in next(batches))
        with autocast(device):
            with torch.no_grad():
                target = target_of(blurry, target, spectrum)
            prediction = network(blurry, spectrum) if told else network(blurry)
        loss = loss_fn(prediction.float(), target.float())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        total += loss.detach()
        if step % 50 == 49 and step + 1 < todo.stop:  # not at every step: reading a number waits for the GPU
            loss_sum = all_reduce_mean(total)
            if not math.isfinite(loss_sum):
                return math.nan
            keep(step + 1, loss_sum)
    return all_reduce_mean(total) / todo.stop

@torch.no_grad()
def validate(network: nn.Module, val_set: Dataset, device: torch.device) -> Scores:
    """Mean PSNR and SSIM of what ``network`` makes of each blurry photo, as an 8-bit picture, against the sharp one.

    A photo counts for at most 50 dB: the PSNR of a perfect one is infinite, and so would be every mean with it.
    Each process scores its share of the photos, each photo once.
    """
    network.eval()
    total = torch.zeros(2, dtype=torch.float64)
    for blurry, sharp in batches_of_one_size(val_set, range(rank(), len(val_set), world_size())):
        blurry, sharp = blurry.to(device, memory_format=torch.channels_last), sharp.to(device)
        with autocast(device):
            prediction = run_tiled(network, blurry)
        prediction = quantize_8bit(prediction)
        each = torch.stack([psnr(prediction, sharp).clamp(max=PERFECT), ssim(prediction, sharp)])
        total += each.sum(dim=1).cpu().double()
    return Scores(*(all_reduce_sum(total, device) / len(val_set)).tolist())

def warmup_cosine(step: int, steps: int) -> float:
    """Factor of the learning rate: up from 0 over the first 5% of ``steps``, then half a cosine down to 0."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))

class Batches(Dataset):
    """Item s is the batch of training step s: patches s * ``batch_size`` and on, shared out in order over processes.

    Args:
        share: patches for each process.
    """

    def __init__(self, train_set: Dataset, batch_size: int, rank: int, share: int):
        self.train_set, self.batch_size, self.rank, self.share = train_set, batch_size, rank, share

    def __getitem__(self, step: int) -> list[Tensor]:
        start = step * self.batch_size + self.rank * self.share
        return self.train_set.batch(range(start, start + self.share))

def start_batches(
    train_set: Dataset, device: torch.device, steps: range, batch_size: int, workers: int
) -> Iterator[list[Tensor]]:
    """What ``train_set.batch`` gives for each of ``steps``, as far as it falls to this process."""
    on_device = getattr(train_set, "on_device", False)  # then patches are cut there, by this process
    loader = DataLoader(
        Batches(train_set, batch_size, rank(), per_rank_batch_size(batch_size)),
        batch_size=None,  # an item is a batch already
        sampler=steps,
        num_workers=0 if on_device else workers,
        pin_memory=device.type == "cuda" and not on_device,
    )
    random_state = torch.get_rng_state()
    batches = iter(loader)
    torch.set_rng_state(random_state)  # starting the loader drew from it, which an interruption must not repeat
    return without_traceback(batches)

def without_traceback(batches: Iterator) -> Iterator:
    """The same; that a worker process ended is told in a sentence."""
    try:
        yield from batches
    except (RuntimeError, ConnectionError, EOFError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        raise UserError(
            "a process that cuts patches has ended, perhaps for want of memory: run again to go on, with NUM_WORKERS = 0"
        ) from None
