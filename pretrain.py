"""Teaches the teacher to sharpen, on ground truth: blurry photo in, sharp photo as the target.

    python pretrain.py

learns from the pairs in data/ or, with PHOTOS, from a folder of sharp photos that are blurred on the fly.
The loop is train.py's, with another target.
"""

from pathlib import Path

from torch import nn

from dataset import BlurredPhotos, PairedImageDataset, find_or_make_data
from models import TeacherCNN
from photos import find_photos
from train import fit, sharp_photo, validate
from utils import PSNRLoss, UserError, pick_device, run_script, seed_everything

# Files
PHOTOS = None  # a folder of sharp photos to blur on the fly; None: the pairs in DATA
VAL_PHOTOS = None  # a folder of other sharp photos to validate on; None: every tenth of PHOTOS
DATA = "data"  # holds train/NNN/{blurry,sharp}.png and val/NNN/{blurry,sharp}.png; used where PHOTOS is None
TEACHER = "outputs/teacher.pth"  # the teacher with the best validation SSIM; move it to weights/ to distil from it
OUTPUTS = "outputs"  # table of the epochs, curves, decoded photos

# Training
NUM_EPOCHS = 40
PATCHES_PER_PHOTO = 16  # random patches of each training photo in one epoch
BATCH_SIZE = 8  # patches per step
PATCH_SIZE = 128  # pixels
LEARNING_RATE = 1e-3  # at its peak: it rises over the first 5% of the steps, then a cosine takes it to 0
SEED = 0

# Machine
DEVICE = "auto"  # "auto" is CUDA when there is one; or "cpu", "cuda:1", ...
NUM_WORKERS = 0  # processes that cut and blur patches beside the training: about 8 for a GPU


def main() -> None:
    device = pick_device(DEVICE)
    if PHOTOS is None:
        data = find_or_make_data(DATA)
        train_set, val_set = PairedImageDataset(data / "train", PATCH_SIZE, SEED), PairedImageDataset(data / "val")
    else:
        train_photos, val_photos = split_photos(PHOTOS, VAL_PHOTOS)
        train_set = BlurredPhotos(train_photos, Path(OUTPUTS) / "train_photos", PATCH_SIZE, SEED)
        val_set = BlurredPhotos(val_photos, Path(OUTPUTS) / "val_photos", seed=SEED)
    print(f"{len(train_set)} training and {len(val_set)} validation photos, on {device}")

    seed_everything(SEED)
    teacher = TeacherCNN().to(device)
    fit(
        "teacher",
        teacher,
        sharp_photo,
        PSNRLoss(),
        {"input": validate(nn.Identity(), val_set, device)},
        Path(TEACHER),
        train_set=train_set,
        val_set=val_set,
        device=device,
        outputs=Path(OUTPUTS),
        epochs=NUM_EPOCHS,
        steps=max(1, len(train_set) * PATCHES_PER_PHOTO // BATCH_SIZE),
        batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        workers=NUM_WORKERS,
    )
    print(f"The best teacher is in {TEACHER}; curves and the table of the epochs are in {OUTPUTS}/")


def split_photos(photos: str, val_photos: str | None) -> tuple[list[Path], list[Path]]:
    """Files to train on and to validate on; no photo is in both."""
    paths = find_photos(photos)
    if val_photos is not None:
        return paths, find_photos(val_photos)
    if len(paths) < 2:
        raise UserError(f"{photos} holds one photo only: add more, or name a folder in VAL_PHOTOS")
    return [p for i, p in enumerate(paths) if i % 10], paths[::10]


if __name__ == "__main__":
    run_script(main)
