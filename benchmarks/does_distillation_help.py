"""Does a student learn more from its teacher than from ground truth? The same student, steps and seeds for each target.

    python benchmarks/does_distillation_help.py DATA

DATA contains train/ and val/ as for train.py. DISTILL_WEIGHT is 1, 0.5 or 0; in the last two rows sharp photos exist for a
quarter of the pairs only: the student learns from these alone, or also from the teacher's outputs for the other photos.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

sys.path.insert(0, str(Path(__file__).parent.parent))
from student_designs import train_student

import train
from cli import CliParser, run_cli, whole_number
from dataset import PairedImageDataset, find_pairs
from models import StudentCNN, load_model, share_estimator
from training.loop import validate
from training.teacher_cache import cache_blur_embeddings, cache_teacher_outputs
from utils import Scores, pick_device

WEIGHTS = Path(train.__file__).parent / "weights" / "teacher.pth"
CASES = ["teacher outputs", "half of each", "sharp photos", "a quarter sharp, the rest teacher outputs"]
CASES += ["a quarter sharp, nothing else"]
KNOWN = 4  # every fourth photo has a sharp version in the last two cases


def main() -> None:
    parser = CliParser(__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--weights", default=WEIGHTS, help="of the teacher")
    parser.add_argument("--steps", type=whole_number(1), default=2000)
    parser.add_argument("--seeds", type=whole_number(1), default=3)
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="CASE", help="only these rows")
    options = parser.parse_args()
    device = pick_device()
    only = options.only or list(CASES)
    folder, val_set = options.data / "train", PairedImageDataset(options.data / "val")
    teacher = load_model(options.weights).to(device, memory_format=torch.channels_last)

    def weighted(weight: float) -> Callable[[int], Dataset]:
        def make(seed: int) -> Dataset:
            photos = PairedImageDataset(folder, train.PATCH_SIZE, seed)
            if weight:
                photos.targets = cache_teacher_outputs(teacher, photos, weight, device)
            return photos

        return make

    def partly_known(seed: int) -> Dataset:
        photos = PairedImageDataset(folder, train.PATCH_SIZE, seed)
        outputs = cache_teacher_outputs(teacher, photos, 1.0, device)
        photos.targets = SomeOf(photos.sharp, outputs, {photos.folders.index(pair) for pair in known_pairs(folder)})
        return photos

    with tempfile.TemporaryDirectory() as known:
        for pair in known_pairs(folder):
            (Path(known) / pair.name).symlink_to(pair.resolve())
        makers = [weighted(1), weighted(0.5), weighted(0), partly_known]
        makers.append(lambda seed: PairedImageDataset(Path(known), train.PATCH_SIZE, seed))
        cases = {name: make for name, make in zip(CASES, makers, strict=True) if name in only}
        blurry, best = (validate(network, val_set, device) for network in (nn.Identity(), teacher))
        print(f"input {blurry.psnr:.2f} dB / {blurry.ssim:.4f}, teacher {best.psnr:.2f} dB / {best.ssim:.4f}")
        print(f"{'target':40s} {'PSNR dB':>8s} {'±':>5s} {'SSIM':>7s} {'±':>6s}   each seed")
        scores = {name: [] for name in cases}
        for seed in range(options.seeds):
            for name, make in cases.items():  # seed by seed: a slow machine can be stopped early
                scores[name].append(train_and_score(teacher, make(seed), val_set, options.steps, seed, device))
                psnr, ssim = np.array(scores[name]).T
                each = " ".join(f"{p:.3f}/{s:.4f}" for p, s in scores[name])
                spread = (psnr.std(ddof=1), ssim.std(ddof=1)) if seed else (np.nan, np.nan)
                print(
                    f"{name:40s} {psnr.mean():8.3f} {spread[0]:5.3f} {ssim.mean():7.4f} {spread[1]:6.4f}   {each}",
                    flush=True,
                )


def train_and_score(
    teacher: nn.Module, photos: Dataset, val_set: Dataset, steps: int, seed: int, device: torch.device
) -> Scores:
    torch.manual_seed(seed)
    student = StudentCNN().to(device, memory_format=torch.channels_last)
    if share_estimator(teacher, student):  # in all cases, so that they differ in their targets alone
        photos.embeddings = cache_blur_embeddings(student, photos, device)
    train_student(student, photos, steps, device)
    return validate(student, val_set, device)


def known_pairs(folder: Path) -> list[Path]:
    """All pairs of every fourth photo; of one photo are those whose names begin alike, before a dot (prepare_data.py)."""
    pairs = find_pairs(folder)
    photos = sorted({pair.name.partition(".")[0] for pair in pairs})
    return [pair for pair in pairs if pair.name.partition(".")[0] in set(photos[::KNOWN])]


class SomeOf:
    """The pixels of the photos ``known`` from one place, of the others from another."""

    def __init__(self, these, others, known: set[int]):
        self.these, self.others, self.known = these, others, known

    def crop(self, index: int, rows: slice, columns: slice) -> np.ndarray:
        return (self.these if index in self.known else self.others).crop(index, rows, columns)


if __name__ == "__main__":
    run_cli(main)
