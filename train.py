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
CACHE_TEACHER = True  # False: at every step, for a teacher that answers differently each time

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
    others |= dict(CACHE_TEACHER=CACHE_TEACHER, REQUIRE_GOOD_TEACHER=REQUIRE_GOOD_TEACHER, RESUME=RESUME)
    others |= dict(COMPILE=COMPILE, TEACHER_LEARNING_RATE=TEACHER_LEARNING_RATE)
    check_constants(settings | others)  # mistakes are told now rather than after the teacher was asked
    outputs = Path(OUTPUTS)
    teacher_file = Path(TEACHER_WEIGHTS or outputs / "teacher.pth")
    check_targets(OUTPUTS, {"BEST_STUDENT": BEST_STUDENT}, {"TEACHER_WEIGHTS": teacher_file})
    device = init_distributed(DEVICE)
    per_rank_batch_size(BATCH_SIZE)  # stops now if it cannot be shared
    seed_everything(SEED)
    student = StudentCNN()
    loss_fn = nn.MSELoss()
    check_network(student)
    check_compiler(COMPILE, device)
    teacher = main_process_first(lambda: load_model(teacher_file)) if TEACHER_WEIGHTS is not None else None
    data = main_process_first(lambda: find_or_make_data(DATA))
    main_process_first(lambda: [find_pairs(data / part) for part in ("train", "val")])  # stops now if a pair is not whole
    lock = main_process_first(lambda: lock_output_dir(outputs))  # noqa: F841  held until the end
    train_set = main_process_first(lambda: PairedImageDataset(data / "train", PATCH_SIZE, SEED))
    val_set = main_process_first(lambda: PairedImageDataset(data / "val"))
    print0(f"{len(train_set)} training and {len(val_set)} validation pairs from {data}, on {device}")
    scores = {"input": validate(nn.Identity(), val_set, device)}
    machine = dict(device=device, outputs=outputs, workers=NUM_WORKERS, compiled=COMPILE, resume=RESUME)
    machine |= dict(checkpoint_minutes=CHECKPOINT_MINUTES)
    of_teacher = settings | {"LEARNING_RATE": TEACHER_LEARNING_RATE, "the photos": f"{train_set.key} {val_set.key}"}
    own = TEACHER_WEIGHTS is None  # then a teacher is taught here first
    taught = own and RESUME and main_process_first(lambda: teacher_is_ready(teacher_file, outputs, of_teacher))
    if own and not taught:
        print0(f"TEACHER_WEIGHTS is None: first a teacher learns from the sharp photos; it goes to {teacher_file}")
        main_process_first(lambda: make_way(outputs, RESUME, of_teacher))
        seed_everything(SEED)
        teacher = TeacherCNN().to(device)
        train_estimator(teacher, train_set, val_set, outputs / "gauge.pth", seed=SEED, workers=NUM_WORKERS, device=device)
        fit("teacher", teacher, as_given, PSNRAndSSIMLoss(), train_set, val_set, scores, teacher_file, of_teacher, **machine)
        mark_finished(outputs / "last_teacher.pth")
    elif own:
        print0(f"the teacher in {teacher_file} was taught already; RESUME = False teaches another")
    if own:
        teacher = main_process_first(lambda: load_model(teacher_file))  # its best epoch
    teacher = teacher.to(device, memory_format=torch.channels_last).requires_grad_(False)
    scores["teacher"] = validate(teacher, val_set, device)
    check_teacher(scores, teacher_file, data, REQUIRE_GOOD_TEACHER and DISTILL_WEIGHT > 0)
    settings |= {"DISTILL_WEIGHT": DISTILL_WEIGHT, "ASK_TEACHER_ONCE": CACHE_TEACHER, "the teacher": fingerprint(teacher)}

    def ask_teacher(blurry: Tensor, sharp: Tensor, spectrum: Tensor) -> Tensor:
        answer = teacher(blurry, spectrum) if hasattr(teacher, "describe") else teacher(blurry)
        return sharp.lerp(answer.float(), DISTILL_WEIGHT)

    shared = DISTILL_WEIGHT > 0 and share_estimator(teacher, student)  # what blur a photo has, both find in the same way
    if CACHE_TEACHER and DISTILL_WEIGHT > 0:  # its answers take the place of the sharp photos
        main_process_first(lambda: train_set.cache_teacher_outputs(teacher, device, DISTILL_WEIGHT))
    target_of = as_given if CACHE_TEACHER or DISTILL_WEIGHT == 0 else ask_teacher
    train_set.load_onto(device, free_gpu_memory(device))

    seed_everything(SEED)
    student.to(device)
    if shared and CACHE_TEACHER and hasattr(student, "find_blur"):
        main_process_first(lambda: train_set.cache_blur_embeddings(student, device))
    fit("student", student, target_of, loss_fn, train_set, val_set, scores, Path(BEST_STUDENT), settings, **machine)

    if rank() == 0:
        load_model(BEST_STUDENT, student)
        scores["student"] = Scores(**student.metadata["val"])
        print_summary({"student": student, "teacher": teacher}, scores, device)
        draw_comparison(outputs, val_set, {"student": student, "teacher": teacher}, device)
        print(f"The best student is in {BEST_STUDENT}; pictures, curves and the table of the epochs are in {OUTPUTS}/")
        print(f"Next: python sharpen.py PHOTO --weights {BEST_STUDENT}, python evaluate.py {data / 'val'} {BEST_STUDENT}")
    mark_finished(outputs / "last.pth")

if __name__ == "__main__":
    run_cli(main)
