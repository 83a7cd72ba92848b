"""Teaches the teacher to sharpen, on ground truth: blurry photo in, sharp photo as the target.

    python pretrain.py

learns from the pairs in data/ or, with PHOTOS, from a folder of sharp photos that are blurred on the fly.
First its gauge learns which filter undoes each blur, then all of it learns in train.py's loop, with another target.
"""

from pathlib import Path

import torch

from torch import nn

from blurred import SyntheticBlurDataset

from checkpoints import check_settings, lock_output_dir, fingerprint, mark_finished, unfinished

from checks import check_constants, check_memory, check_network, check_targets

from dataset import PairedImageDataset, find_or_make_data

from training.estimator import train_estimator

from models import TeacherCNN, load_model

from photos import find_photos

from processes import main_process_first, print0, per_rank_batch_size, init_distributed

from train import as_given, fit, validate

from utils import PSNRAndSSIMLoss, UserError, run_cli, seed_everything

# Files
PHOTOS = None  # a folder of sharp photos to blur on the fly, 6 bytes of memory per pixel; None: the pairs in DATA

VAL_PHOTOS = None  # a folder of other sharp photos to validate on; None: every tenth of PHOTOS

DATA = "data"  # holds train/NNN/{blurry,sharp}.png and val/NNN/{blurry,sharp}.png; used where PHOTOS is None

START_FROM = None  # weights to go on from; "weights/teacher.pth" adapts the shipped teacher to your photos; None: anew

TEACHER = "outputs/teacher.pth"  # the teacher with the best validation SSIM; name it in train.py as TEACHER_WEIGHTS

OUTPUTS = "outputs"  # table of the epochs, curves, decoded photos

# Training
NUM_EPOCHS = 12

PATCHES_PER_PHOTO = 32  # random patches of each training photo in one epoch

BATCH_SIZE = 8  # patches per step

PATCH_SIZE = 128  # pixels

LEARNING_RATE = 4e-4  # at its peak, 1e-3 was too much: it rises over the first 5% of the steps, then a cosine takes it to 0

SEED = 0

# The gauge, before that
ESTIMATOR_VERSIONS = 24  # blurry versions of each photo, where they are blurred on the fly

ESTIMATOR_PASSES = 16  # times that the gauge sees each of them

ESTIMATOR_LEARNING_RATE = 4e-3  # at its peak

# Machine
DEVICE = "auto"  # "auto" is CUDA when there is one; or "cpu", "cuda:1", ...

NUM_WORKERS = 0  # processes that cut and blur patches beside the training: about 8 for a GPU

COMPILE = False  # True: torch.compile the teacher; takes a minute, then steps on a GPU are faster

CHECKPOINT_MINUTES = 5.0  # within an epoch; there is one after each epoch anyway

RESUME = True  # go on with an interrupted training; False: drop it and start anew

def main() -> None:
    settings = dict(
        NUM_EPOCHS=NUM_EPOCHS,
        PATCHES_PER_PHOTO=PATCHES_PER_PHOTO,
        BATCH_SIZE=BATCH_SIZE,
        PATCH_SIZE=PATCH_SIZE,
        LEARNING_RATE=LEARNING_RATE,
        SEED=SEED,
    )
    estimator_settings = dict(ESTIMATOR_VERSIONS=ESTIMATOR_VERSIONS, ESTIMATOR_PASSES=ESTIMATOR_PASSES, ESTIMATOR_LEARNING_RATE=ESTIMATOR_LEARNING_RATE)
    others = dict(NUM_WORKERS=NUM_WORKERS, CHECKPOINT_MINUTES=CHECKPOINT_MINUTES, RESUME=RESUME, COMPILE=COMPILE)
    others |= dict(DATA=DATA, PHOTOS=PHOTOS, VAL_PHOTOS=VAL_PHOTOS, START_FROM=START_FROM, TEACHER=TEACHER, OUTPUTS=OUTPUTS)
    check_constants(settings | estimator_settings | others)
    check_targets(OUTPUTS, {"TEACHER": TEACHER}, {"START_FROM": START_FROM})
    if VAL_PHOTOS is not None and PHOTOS is None:
        raise UserError(f"VAL_PHOTOS = {VAL_PHOTOS!r} goes with PHOTOS, which is None: set both or none")
    device = init_distributed(DEVICE)
    per_rank_batch_size(BATCH_SIZE)
    seed_everything(SEED)
    teacher = TeacherCNN() if START_FROM is None else main_process_first(lambda: load_model(START_FROM))
    check_network(teacher)
    lock = main_process_first(lambda: lock_output_dir(Path(OUTPUTS)))  # noqa: F841  held until the end
    if PHOTOS is None:
        data = main_process_first(lambda: find_or_make_data(DATA))
        train_set = main_process_first(lambda: PairedImageDataset(data / "train", PATCH_SIZE, SEED))
        val_set = main_process_first(lambda: PairedImageDataset(data / "val"))
    else:
        train_photos, val_photos = split_photos(PHOTOS, VAL_PHOTOS)
        cache = Path(OUTPUTS) / ".cache"
        train_set = main_process_first(lambda: SyntheticBlurDataset(train_photos, cache / "train", PATCH_SIZE, SEED))
        val_set = main_process_first(lambda: SyntheticBlurDataset(val_photos, cache / "val", seed=SEED))
        main_process_first(lambda: check_memory(train_set.bytes_in_memory, NUM_WORKERS))
    print0(f"{len(train_set)} training and {len(val_set)} validation photos, on {device}")

    settings |= estimator_settings  # which tell with what gauge the teacher begins
    settings["START_FROM"] = START_FROM and f"{START_FROM} {fingerprint(teacher)}"
    unfinished_file = Path(OUTPUTS) / "last_teacher.pth"
    if RESUME and unfinished(unfinished_file):
        # Now rather than after the gauge was taught otherwise
        main_process_first(lambda: check_settings(unfinished_file, settings))
    scores = {"input": validate(nn.Identity(), val_set, device)}
    if START_FROM is not None:
        scores["start"] = validate(teacher.to(device), val_set, device)
    train_estimator(
        teacher,
        train_set,
        val_set,
        Path(OUTPUTS) / "gauge.pth",
        seed=SEED,
        workers=NUM_WORKERS,
        device=device,
        draws=1 if PHOTOS is None else ESTIMATOR_VERSIONS,
        passes=ESTIMATOR_PASSES,
        learning_rate=ESTIMATOR_LEARNING_RATE,
    )
    teacher.to(device, memory_format=torch.channels_last)
    machine = dict(
        device=device,
        outputs=Path(OUTPUTS),
        workers=NUM_WORKERS,
        compiled=COMPILE,
        checkpoint_minutes=CHECKPOINT_MINUTES,
        resume=RESUME,
    )
    fit("teacher", teacher, as_given, PSNRAndSSIMLoss(), train_set, val_set, scores, Path(TEACHER), settings, **machine)
    mark_finished(Path(OUTPUTS) / "last_teacher.pth")
    print0(f"The best teacher is in {TEACHER}; curves and the table of the epochs are in {OUTPUTS}/")
    if START_FROM is not None and main_process_first(lambda: load_model(TEACHER)).metadata["val"]["ssim"] <= scores["start"].ssim:
        print0(f"It does not beat {START_FROM} on the validation photos: keep that one, or train longer or on more photos")

def split_photos(photos: str, val_photos: str | None) -> tuple[list[Path], list[Path]]:
    """Files to train on and to validate on; no photo is in both."""
    paths = find_photos(photos)
    if val_photos is not None:
        apart = find_photos(val_photos)
        held_out = {path.resolve() for path in apart}
        paths = [path for path in paths if path.resolve() not in held_out]
        if not paths:
            raise UserError(f"{val_photos} holds all photos of {photos}: validate on others than those to train on")
        return paths, apart
    if len(paths) < 2:
        raise UserError(f"{photos} holds one photo only: add more, or name a folder in VAL_PHOTOS")
    return [p for i, p in enumerate(paths) if i % 10], paths[::10]

if __name__ == "__main__":
    run_cli(main)
