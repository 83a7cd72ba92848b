"""Knowledge distillation: a small student learns to sharpen photos from a large pre-trained teacher.

    python train.py

trains on the pairs in data/, or on demo data if there are none. Edit the constants below, then run.
"""

from pathlib import Path

import torch
from torch import nn

from cli import run_cli
from dataset import PairedImageDataset
from images.demo_data import find_or_make_data
from inference import run_patches
from models import StudentCNN, copy_estimator, load_model
from training.config import TrainConfig, check_loss, check_network, check_paths
from training.distributed import init_distributed, main_process_first
from training.fingerprint import fingerprint
from training.loop import check_teacher, validate
from training.report import summarize
from training.run import TrainingRun, lock_path
from training.teacher_cache import cache_blur_embeddings, cache_teacher_outputs
from utils import autocast, print0, relative_weight

# Files
DATA = "data"  # contains train/NNN/{blurry,sharp}.png and val/NNN/{blurry,sharp}.png; see need_sharp below
TEACHER_WEIGHTS = Path(__file__).resolve().parent / "weights/teacher.pth"  # shipped, or your own from pretrain.py
START_FROM = None  # student to start from; "weights/student.pth" adapts the shipped one to your photos; None: random
BEST_STUDENT = "best_student_model.pth"  # the student with the best validation SSIM
OUTPUTS = "outputs"  # table of epochs, curves, pictures, checkpoint, the last epoch's student

# Distillation
DISTILL_WEIGHT = 1.0  # 1: the target is the teacher's output; 0: the sharp photo; 0.5, a blend, made the shipped student
FREEZE_ESTIMATOR = True  # False trains the copied blur estimator, too: 2.5 times slower, better in a long training
CACHE_TEACHER = True  # run the teacher once per whole photo and store its output; False: on each patch, at every step
TEACHER_ORIENTATIONS = 8  # flips and rotations over which the cached outputs are averaged: better and 8 times slower than 1
REQUIRE_GOOD_TEACHER = True  # stop if the teacher does not beat the blurry input on the validation pairs

# Training
NUM_EPOCHS = 30
PATCHES_PER_PHOTO = 32  # random patches from each training photo per epoch
BATCH_SIZE = 8  # patches per step, over all processes
PATCH_SIZE = 128  # pixels
LEARNING_RATE = 1e-3  # peak, after a warmup over 5% of the steps; then a cosine down to 0. 2e-3 scored lower
SEED = 0  # gives the same weights on the same CPU with the same number of threads; OMP_NUM_THREADS fixes that

# Machine
DEVICE = "auto"  # CUDA or Apple's GPU if available; or "cpu", "cuda:1", ...
NUM_WORKERS = 0  # processes that load patches; more than 0 pays off with slow disks
TENSORBOARD = False  # also write scores and pictures to OUTPUTS for TensorBoard: pip install tensorboard
RESUME = True  # resume an interrupted training; False: discard it and start over


def main() -> None:
    config = TrainConfig(
        num_epochs=NUM_EPOCHS, patches_per_photo=PATCHES_PER_PHOTO, batch_size=BATCH_SIZE, patch_size=PATCH_SIZE,
        learning_rate=LEARNING_RATE, seed=SEED, distill_weight=DISTILL_WEIGHT, freeze_estimator=FREEZE_ESTIMATOR,
        cache_teacher=CACHE_TEACHER, teacher_orientations=TEACHER_ORIENTATIONS, num_workers=NUM_WORKERS,
        tensorboard=TENSORBOARD, resume=RESUME,
    )  # fmt: skip
    read = {"TEACHER_WEIGHTS": TEACHER_WEIGHTS, "DATA": DATA} | ({"START_FROM": START_FROM} if START_FROM else {})
    check_paths(OUTPUTS, "BEST_STUDENT", BEST_STUDENT, read)
    device = init_distributed(DEVICE)
    torch.manual_seed(SEED)
    loss_fn = nn.MSELoss()
    with main_process_first():  # errors in here are raised on every rank and reported once
        student = load_model(START_FROM) if START_FROM else StudentCNN()
        check_network(student)
        check_loss(loss_fn, device, PATCH_SIZE)
        teacher = load_model(TEACHER_WEIGHTS).requires_grad_(False)
        # A new student copies the teacher's blur estimator, if both have one; that of START_FROM keeps its own
        has_estimator = hasattr(student, "estimator") if START_FROM else copy_estimator(teacher, student)
        if has_estimator:
            student.estimator.requires_grad_(not FREEZE_ESTIMATOR)
        data = find_or_make_data(DATA)
        locks = lock_path(OUTPUTS), lock_path(BEST_STUDENT)  # noqa: F841  held until the end
        need_sharp = DISTILL_WEIGHT < 1 or not CACHE_TEACHER  # if False, sharp.png may be missing in train/
        train_set = PairedImageDataset(data / "train", PATCH_SIZE, SEED, need_sharp)
        val_set = PairedImageDataset(data / "val")
        train_set.check_disjoint(val_set)
    print0(f"{len(train_set)} training and {len(val_set)} validation pairs from {data}, on {device}")
    if not all(train_set.paired):
        print0(f"{train_set.paired.count(False)} training photos have no sharp.png: the teacher's outputs stand in for it")

    teacher.to(device, memory_format=torch.channels_last)
    baselines = {"input": validate(nn.Identity(), val_set, device), "teacher": validate(teacher, val_set, device)}
    use_teacher = DISTILL_WEIGHT > 0  # else the targets are the sharp photos
    check_teacher(baselines, TEACHER_WEIGHTS, data / "val", REQUIRE_GOOD_TEACHER and use_teacher)
    student.to(device, memory_format=torch.channels_last)
    if START_FROM:
        baselines["start"] = validate(student, val_set, device)
    if CACHE_TEACHER and use_teacher:
        train_set.targets = cache_teacher_outputs(teacher, train_set, DISTILL_WEIGHT, device, TEACHER_ORIENTATIONS)
    if CACHE_TEACHER and has_estimator and FREEZE_ESTIMATOR:
        train_set.embeddings = cache_blur_embeddings(student, train_set, device)

    torch.manual_seed(SEED)  # again: what follows must not depend on whether the outputs were cached before
    optimizer = torch.optim.AdamW(student.parameters(), LEARNING_RATE, weight_decay=1e-4, fused=True)
    run = TrainingRun(
        "student", student, optimizer, loss_fn, train_set, val_set.key, config, device,
        baselines=baselines, best_file=BEST_STUDENT, outputs=OUTPUTS,
        extra={"the teacher": fingerprint(teacher), "START_FROM": START_FROM and fingerprint(student)},
    )  # fmt: skip
    with run:
        for _ in run.epochs():
            for blurry, target, blur, input_mse in run.batches():  # blur: cached blur embeddings, else spectra
                with autocast(device):
                    if use_teacher and not CACHE_TEACHER:
                        with torch.no_grad():
                            target = target.lerp(run_patches(teacher, blurry, blur).float().clamp(0, 1), DISTILL_WEIGHT)
                    prediction = run_patches(run.model, blurry, blur)  # run.model: the student, under torchrun in DDP
                prediction = prediction.float()
                prediction.register_hook(relative_weight(input_mse).mul)  # scales any loss's gradient by ~1 / input_mse
                run.step(loss_fn(prediction, target))  # backward, gradient clipping, optimizer, schedule, average
            # The moving average of the student's weights is scored, and saved if its SSIM is the best
            run.finish_epoch(validate(run.averaged, val_set, device))
        summarize(run, teacher, val_set)


if __name__ == "__main__":
    run_cli(main)
