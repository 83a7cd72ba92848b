"""Trains the teacher on ground truth: blurry photo in, sharp photo as the target.

    python pretrain.py

trains on the pairs in data/ or, with PHOTOS, on a folder of sharp photos that are blurred on the fly. First the blur
estimators learn which filter undoes each blur, then the whole network learns in the same loop as in train.py.
"""

import os
from pathlib import Path

import torch
from torch import nn

from cli import run_cli
from dataset import PairedImageDataset, SyntheticBlurDataset
from images.demo_data import find_or_make_data
from images.photos import find_single_photos
from inference import run_patches
from models import TeacherCNN, load_model
from training.config import TrainConfig, check_loss, check_network, check_paths
from training.distributed import init_distributed, main_process_first
from training.estimator import train_estimator
from training.fingerprint import fingerprint
from training.loop import validate
from training.report import recommend
from training.run import TrainingRun, lock_path
from utils import RelativeMSEAndSSIMLoss, UserError, autocast, print0

# Files
PHOTOS = None  # folder of sharp photos to blur on the fly, up to 1.4 MB of memory each, in each worker; None: DATA
VAL_PHOTOS = None  # folder of other sharp photos to validate on; None: every tenth of PHOTOS
DATA = "data"  # contains train/NNN/{blurry,sharp}.png and val/NNN/{blurry,sharp}.png; used if PHOTOS is None
START_FROM = None  # weights to start from; "weights/teacher.pth" adapts the shipped teacher to your photos; None: random
TEACHER = "outputs/teacher.pth"  # the teacher with the best validation SSIM; set TEACHER_WEIGHTS in train.py to it
OUTPUTS = "outputs"  # table of epochs, curves, checkpoint, decoded photos, the last epoch's teacher

# Training
NUM_EPOCHS = 12
PATCHES_PER_PHOTO = 32  # random patches from each training photo per epoch
BATCH_SIZE = 8  # patches per step, over all processes
PATCH_SIZE = 128  # pixels
LEARNING_RATE = 4e-4  # peak, after a warmup over 5% of the steps; then a cosine down to 0. 1e-3 scored lower
SEED = 0

# Blur estimator, trained first; START_FROM brings its own
ESTIMATOR_VERSIONS = 24  # blurry versions of each photo, if they are blurred on the fly
ESTIMATOR_PASSES = 4  # over all of them, for the estimator of the teacher and then for that of its students
ESTIMATOR_LEARNING_RATE = 4e-3  # peak

# Machine
DEVICE = "auto"  # CUDA or Apple's GPU if available; or "cpu", "cuda:1", ...
NUM_WORKERS = 0  # processes that load and blur patches: about 8 for a GPU
TENSORBOARD = False  # also write scores to OUTPUTS for TensorBoard: pip install tensorboard
RESUME = True  # resume an interrupted training; False: discard it and start over


def main() -> None:
    config = TrainConfig(
        num_epochs=NUM_EPOCHS, patches_per_photo=PATCHES_PER_PHOTO, batch_size=BATCH_SIZE, patch_size=PATCH_SIZE,
        learning_rate=LEARNING_RATE, seed=SEED, estimator_versions=ESTIMATOR_VERSIONS if PHOTOS else 1,  # pairs have one
        estimator_passes=ESTIMATOR_PASSES, estimator_learning_rate=ESTIMATOR_LEARNING_RATE,
        num_workers=NUM_WORKERS, tensorboard=TENSORBOARD, resume=RESUME,
    )  # fmt: skip
    optional = {"START_FROM": START_FROM, "PHOTOS": PHOTOS, "VAL_PHOTOS": VAL_PHOTOS}
    read = {"DATA": DATA} | {name: value for name, value in optional.items() if value is not None}
    check_paths(OUTPUTS, "TEACHER", TEACHER, read)
    if VAL_PHOTOS and not PHOTOS:
        raise UserError(f"VAL_PHOTOS = {VAL_PHOTOS!r} needs PHOTOS, which is None: set both or neither")
    device = init_distributed(DEVICE)
    torch.manual_seed(SEED)
    outputs, loss_fn = Path(OUTPUTS), RelativeMSEAndSSIMLoss()
    with main_process_first():  # errors in here are raised on every rank and reported once
        teacher = TeacherCNN() if START_FROM is None else load_model(START_FROM)
        check_network(teacher)
        check_loss(loss_fn, device, PATCH_SIZE, with_input_mse=True)
        locks = lock_path(outputs), lock_path(TEACHER)  # noqa: F841  held until the end
        if PHOTOS:
            train_set, val_set = open_photos()
        else:
            data = find_or_make_data(DATA)
            train_set, val_set = PairedImageDataset(data / "train", PATCH_SIZE, SEED), PairedImageDataset(data / "val")
        train_set.check_disjoint(val_set)
    print0(f"{len(train_set)} training and {len(val_set)} validation photos, on {device}")

    scores = {"input": validate(nn.Identity(), val_set, device)}
    if START_FROM:
        scores["start"] = validate(teacher.to(device), val_set, device)
    else:
        train_estimator(teacher, train_set, val_set, outputs / "estimator.pth", config, device)
    teacher.to(device, memory_format=torch.channels_last)
    torch.manual_seed(SEED)  # again: what follows must not depend on whether the estimator was trained before
    optimizer = torch.optim.AdamW(teacher.parameters(), LEARNING_RATE, weight_decay=1e-4, fused=True)
    run = TrainingRun(
        "teacher", teacher, optimizer, loss_fn, train_set, val_set.key, config, device,
        baselines=scores, best_file=TEACHER, outputs=outputs, extra={"START_FROM": START_FROM and fingerprint(teacher)},
    )  # fmt: skip
    with run:
        for _ in run.epochs():
            for blurry, sharp, spectra, input_mse in run.batches():
                with autocast(device):
                    prediction = run_patches(run.model, blurry, spectra)  # run.model: the teacher, under torchrun in DDP
                run.step(loss_fn(prediction.float(), sharp, input_mse))  # backward, clipping, optimizer, schedule, average
            # The moving average of the teacher's weights is scored, and saved if its SSIM is the best
            run.finish_epoch(validate(run.averaged, val_set, device))
    recommend(run, f"set TEACHER_WEIGHTS = {str(TEACHER)!r} in train.py, then python train.py")


def open_photos() -> tuple[SyntheticBlurDataset, SyntheticBlurDataset]:
    photos = find_single_photos(PHOTOS)
    val_photos = find_single_photos(VAL_PHOTOS) if VAL_PHOTOS else photos[::10]
    held_out = {os.path.realpath(path) for path in val_photos}  # unlike Path.resolve it accepts circular links
    train_photos = [path for path in photos if os.path.realpath(path) not in held_out]
    if not train_photos:
        raise UserError(f"no photo of {PHOTOS} is left to train on: add more, or name a folder of others in VAL_PHOTOS")
    cache = Path(OUTPUTS) / ".cache"
    train_set = SyntheticBlurDataset(train_photos, cache / "train", PATCH_SIZE, SEED)
    return train_set, SyntheticBlurDataset(val_photos, cache / "val", seed=SEED)


if __name__ == "__main__":
    run_cli(main)
