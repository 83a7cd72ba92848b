"""Distillation: a small student learns to sharpen photos as a large, trained teacher does.

    python train.py

learns from the pairs in data/, or from demo data where there are none. Edit the constants, then run.
"""

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
    claim,
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
from gauge_training import teach_gauge
from models import StudentCNN, TeacherCNN, load_model, run_tiled, save_model, share_gauge
from processes import (
    distributed,
    first_rank_first,
    mean_over_processes,
    rank,
    room_on,
    say,
    share_of_batch,
    start_processes,
    sum_over_processes,
    world_size,
)
from report import draw_comparison, draw_curves, epoch_row, print_epoch, print_summary, write_table
from utils import (
    PERFECT,
    PSNRAndSSIMLoss,
    Scores,
    UserError,
    as_saved,
    autocast,
    psnr,
    run_script,
    seed_everything,
    ssim,
)

# Files
DATA = "data"  # holds train/NNN/{blurry,sharp}.png and val/NNN/{blurry,sharp}.png
TEACHER_WEIGHTS = "weights/teacher.pth"  # None: first teach a teacher on the training pairs
BEST_STUDENT = "best_student_model.pth"  # the student with the best validation SSIM
OUTPUTS = "outputs"  # table of the epochs, curves, pictures

# Training
NUM_EPOCHS = 40
PATCHES_PER_PHOTO = 32  # random patches of each training photo in one epoch
BATCH_SIZE = 8  # patches per step
PATCH_SIZE = 128  # pixels
DISTILL_WEIGHT = 1.0  # of the teacher's answer in the target, the rest is the sharp photo: 0 is ground truth only
LEARNING_RATE = 1e-3  # at its peak, 2e-3 is too much: it rises over 5% of the steps, then a cosine takes it to 0
TEACHER_LEARNING_RATE = 4e-4  # the same for a teacher, where TEACHER_WEIGHTS is None; 1e-3 is too much
SEED = 0  # the same seed gives the same weights on the same CPU

# Machine
DEVICE = "auto"  # "auto" is CUDA when there is one; or "cpu", "cuda:1", ...
NUM_WORKERS = 0  # processes that cut patches beside the training: for slow disks
COMPILE = False  # True: torch.compile the student; takes a minute, then steps on a GPU are faster
CHECKPOINT_MINUTES = 5.0  # within an epoch; there is one after each epoch anyway

# Safety
ASK_TEACHER_ONCE = True  # False: at every step, for a teacher that answers differently each time
REQUIRE_GOOD_TEACHER = True  # stop if the teacher does not beat the blurry input on the validation pairs
RESUME = True  # go on with an interrupted training; False: drop it and start anew


def main() -> None:
    settings = dict(  # what an interrupted training must share to go on
        NUM_EPOCHS=NUM_EPOCHS,
        PATCHES_PER_PHOTO=PATCHES_PER_PHOTO,
        BATCH_SIZE=BATCH_SIZE,
        PATCH_SIZE=PATCH_SIZE,
        LEARNING_RATE=LEARNING_RATE,
        SEED=SEED,
    )
    others = dict(DISTILL_WEIGHT=DISTILL_WEIGHT, NUM_WORKERS=NUM_WORKERS, CHECKPOINT_MINUTES=CHECKPOINT_MINUTES)
    others |= dict(DATA=DATA, TEACHER_WEIGHTS=TEACHER_WEIGHTS, BEST_STUDENT=BEST_STUDENT, OUTPUTS=OUTPUTS)
    others |= dict(ASK_TEACHER_ONCE=ASK_TEACHER_ONCE, REQUIRE_GOOD_TEACHER=REQUIRE_GOOD_TEACHER, RESUME=RESUME)
    others |= dict(COMPILE=COMPILE, TEACHER_LEARNING_RATE=TEACHER_LEARNING_RATE)
    check_constants(settings | others)  # mistakes are told now rather than after the teacher was asked
    outputs = Path(OUTPUTS)
    teacher_file = Path(TEACHER_WEIGHTS or outputs / "teacher.pth")
    check_targets(OUTPUTS, {"BEST_STUDENT": BEST_STUDENT}, {"TEACHER_WEIGHTS": teacher_file})
    device = start_processes(DEVICE)
    share_of_batch(BATCH_SIZE)  # stops now if it cannot be shared
    seed_everything(SEED)
    student = StudentCNN()
    loss_fn = nn.MSELoss()
    check_network(student)
    check_compiler(COMPILE, device)
    teacher = first_rank_first(lambda: load_model(teacher_file)) if TEACHER_WEIGHTS is not None else None
    data = first_rank_first(lambda: find_or_make_data(DATA))
    first_rank_first(lambda: [find_pairs(data / part) for part in ("train", "val")])  # stops now if a pair is not whole
    lock = first_rank_first(lambda: claim(outputs))  # noqa: F841  held until the end
    train_set = first_rank_first(lambda: PairedImageDataset(data / "train", PATCH_SIZE, SEED))
    val_set = first_rank_first(lambda: PairedImageDataset(data / "val"))
    say(f"{len(train_set)} training and {len(val_set)} validation pairs from {data}, on {device}")
    scores = {"input": validate(nn.Identity(), val_set, device)}
    machine = dict(device=device, outputs=outputs, workers=NUM_WORKERS, compiled=COMPILE, resume=RESUME)
    machine |= dict(checkpoint_minutes=CHECKPOINT_MINUTES)
    of_teacher = settings | {"LEARNING_RATE": TEACHER_LEARNING_RATE, "the photos": f"{train_set.key} {val_set.key}"}
    own = TEACHER_WEIGHTS is None  # then a teacher is taught here first
    taught = own and RESUME and first_rank_first(lambda: teacher_is_ready(teacher_file, outputs, of_teacher))
    if own and not taught:
        say(f"TEACHER_WEIGHTS is None: first a teacher learns from the sharp photos; it goes to {teacher_file}")
        first_rank_first(lambda: make_way(outputs, RESUME, of_teacher))
        seed_everything(SEED)
        teacher = TeacherCNN().to(device)
        teach_gauge(teacher, train_set, val_set, outputs / "gauge.pth", seed=SEED, workers=NUM_WORKERS, device=device)
        fit("teacher", teacher, as_given, PSNRAndSSIMLoss(), train_set, val_set, scores, teacher_file, of_teacher, **machine)
        mark_finished(outputs / "last_teacher.pth")
    elif own:
        say(f"the teacher in {teacher_file} was taught already; RESUME = False teaches another")
    if own:
        teacher = first_rank_first(lambda: load_model(teacher_file))  # its best epoch
    teacher = teacher.to(device, memory_format=torch.channels_last).requires_grad_(False)
    scores["teacher"] = validate(teacher, val_set, device)
    check_teacher(scores, teacher_file, data, REQUIRE_GOOD_TEACHER and DISTILL_WEIGHT > 0)
    settings |= {"DISTILL_WEIGHT": DISTILL_WEIGHT, "ASK_TEACHER_ONCE": ASK_TEACHER_ONCE, "the teacher": fingerprint(teacher)}

    def ask_teacher(blurry: Tensor, sharp: Tensor, description: Tensor) -> Tensor:
        answer = teacher(blurry, description) if hasattr(teacher, "describe") else teacher(blurry)
        return sharp.lerp(answer.float(), DISTILL_WEIGHT)

    shared = DISTILL_WEIGHT > 0 and share_gauge(teacher, student)  # what blur a photo has, both find in the same way
    if ASK_TEACHER_ONCE and DISTILL_WEIGHT > 0:  # its answers take the place of the sharp photos
        first_rank_first(lambda: train_set.ask_once(teacher, device, DISTILL_WEIGHT))
    target_of = as_given if ASK_TEACHER_ONCE or DISTILL_WEIGHT == 0 else ask_teacher
    train_set.load_onto(device, room_on(device))

    seed_everything(SEED)
    student.to(device)
    if shared and ASK_TEACHER_ONCE and hasattr(student, "find_blur"):
        first_rank_first(lambda: train_set.find_blurs_once(student, device))
    fit("student", student, target_of, loss_fn, train_set, val_set, scores, Path(BEST_STUDENT), settings, **machine)

    if rank() == 0:
        load_model(BEST_STUDENT, student)
        scores["student"] = Scores(**student.facts["val"])
        print_summary({"student": student, "teacher": teacher}, scores, device)
        draw_comparison(outputs, val_set, {"student": student, "teacher": teacher}, device)
        print(f"The best student is in {BEST_STUDENT}; pictures, curves and the table of the epochs are in {OUTPUTS}/")
        print(f"Next: python sharpen.py PHOTO --weights {BEST_STUDENT}, python evaluate.py {data / 'val'} {BEST_STUDENT}")
    mark_finished(outputs / "last.pth")


def as_given(blurry: Tensor, target: Tensor, description: Tensor) -> Tensor:
    """The target that comes with the patches: the sharp photo or, once the teacher was asked, what it answered."""
    return target


def check_teacher(scores: dict[str, Scores], file: Path, data: Path, required: bool) -> None:
    """A student cannot learn from a teacher what it does not know: stop before the time is spent."""
    blurry, teacher = scores["input"], scores["teacher"]
    say(f"input   {blurry.psnr:6.2f} dB  SSIM {blurry.ssim:.4f}\nteacher {teacher.psnr:6.2f} dB  SSIM {teacher.ssim:.4f}")
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
        say(f"going on with the training that was interrupted after step {progress['step']} of {epochs * steps}")
    batches = start_batches(train_set, device, range(progress["step"], epochs * steps), batch_size, workers)
    if compiled:
        network.compile()  # in place: the names of the weights stay as they are
    trained = distributed(network, device)
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
        say(f"\nStopped after {done} of {epochs} epochs: {kept}. Run again to go on.")
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
        blurry, target, description = (part.to(device, non_blocking=True) for part in next(batches))
        with autocast(device):
            with torch.no_grad():
                target = target_of(blurry, target, description)
            prediction = network(blurry, description) if told else network(blurry)
        loss = loss_fn(prediction.float(), target.float())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        total += loss.detach()
        if step % 50 == 49 and step + 1 < todo.stop:  # not at every step: reading a number waits for the GPU
            loss_sum = mean_over_processes(total)
            if not math.isfinite(loss_sum):
                return math.nan
            keep(step + 1, loss_sum)
    return mean_over_processes(total) / todo.stop


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
        prediction = as_saved(prediction)
        each = torch.stack([psnr(prediction, sharp).clamp(max=PERFECT), ssim(prediction, sharp)])
        total += each.sum(dim=1).cpu().double()
    return Scores(*(sum_over_processes(total, device) / len(val_set)).tolist())


def warmup_cosine(step: int, steps: int) -> float:
    """Factor of the learning rate: up from 0 over the first 5% of ``steps``, then half a cosine down to 0."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


if __name__ == "__main__":
    run_script(main)
