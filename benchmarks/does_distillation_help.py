"""Does a student learn more from its teacher than from ground truth? The same student, steps and seeds for each row.

    python benchmarks/does_distillation_help.py DATA

DATA contains train/ and val/ as for train.py. All rows but one train on the pairs of every second photo of train/. What
differs is the target, or what the student takes over from its teacher: a copy of the blur estimator, in all rows but one.
The last row has as many photos again, without their sharp versions: there the teacher's outputs are the targets.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from student_designs import train_student
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import train
from cli import CliParser, run_cli, whole_number
from dataset import PairedImageDataset
from images.photos import PixelFile
from models import StudentCNN, copy_estimator, load_model
from training.loop import validate
from training.teacher_cache import cache_blur_embeddings, cache_teacher_outputs
from utils import pick_device

WEIGHTS = Path(train.__file__).parent / "weights" / "teacher.pth"
SHARP, HALF, OUTPUTS = "sharp photos", "half of each", "teacher outputs"
OWN, MORE = "sharp photos, a blur estimator of its own", "half of each; as many again, outputs alone"
SHARES = {SHARP: 0.0, HALF: 0.5, OUTPUTS: 1.0, OWN: 0.0, MORE: 0.5}  # of the outputs in the targets


def main() -> None:
    parser = CliParser(__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--weights", default=WEIGHTS, help="of the teacher")
    parser.add_argument("--steps", type=whole_number(1), default=2000)
    parser.add_argument("--patch-size", type=whole_number(32), default=train.PATCH_SIZE)
    parser.add_argument("--seeds", type=whole_number(1), default=3)
    parser.add_argument("--only", nargs="+", default=list(SHARES), choices=list(SHARES), metavar="ROW")
    options = parser.parse_args()
    device = pick_device()
    everything, val_set = PairedImageDataset(options.data / "train"), PairedImageDataset(options.data / "val")
    teacher = load_model(options.weights).to(device, memory_format=torch.channels_last)
    outputs = cache_teacher_outputs(teacher, everything, 1.0, device)
    known = every_second_photo(everything.folders)
    blurry, best = (validate(network, val_set, device) for network in (nn.Identity(), teacher))
    print(f"{len(known)} pairs with sharp photos, {len(everything) - len(known)} without")
    print(f"input {blurry.psnr:.2f} dB / {blurry.ssim:.4f}, teacher {best.psnr:.2f} dB / {best.ssim:.4f}")
    print(f"{'target':44s} {'PSNR dB':>8s} {'±':>5s} {'SSIM':>7s} {'±':>6s}   each seed", flush=True)
    scores = {name: [] for name in options.only}
    with tempfile.TemporaryDirectory() as half:
        for index in known:
            (Path(half) / everything.folders[index].name).symlink_to(everything.folders[index].resolve())
        for seed in range(options.seeds):
            for name in options.only:  # seed by seed: a slow machine can be stopped early
                indices = range(len(everything)) if name == MORE else known
                photos = PairedImageDataset(options.data / "train" if name == MORE else half, options.patch_size, seed)
                photos.targets = Blend(photos.sharp, outputs, indices, [SHARES[name] if i in known else 1 for i in indices])
                torch.manual_seed(seed)
                student = StudentCNN().to(device, memory_format=torch.channels_last)
                if name != OWN and copy_estimator(teacher, student):
                    photos.embeddings = cache_blur_embeddings(student, photos, device)
                train_student(student, photos, options.steps, device)
                scores[name].append(validate(student, val_set, device))
                psnr, ssim = np.array(scores[name]).T
                spread = (psnr.std(ddof=1), ssim.std(ddof=1)) if seed else (np.nan, np.nan)
                each = " ".join(f"{p:.3f}/{s:.4f}" for p, s in scores[name])
                row = f"{name:44s} {psnr.mean():8.3f} {spread[0]:5.3f} {ssim.mean():7.4f} {spread[1]:6.4f}   {each}"
                print(row, flush=True)


def every_second_photo(folders: list[Path]) -> list[int]:
    """Indices of its pairs; of one photo are those whose names begin alike, before a dot (prepare_data.py)."""
    names = [folder.name.partition(".")[0] for folder in folders]
    chosen = set(sorted(set(names))[::2])
    return [index for index, name in enumerate(names) if name in chosen]


class Blend:
    """Targets: of photo i the share ``shares[i]`` is output ``indices[i]`` of the teacher, the rest is the sharp photo."""

    def __init__(self, sharp: PixelFile, outputs: PixelFile, indices: list[int] | range, shares: list[float]):
        self.sharp, self.outputs, self.indices, self.shares = sharp, outputs, indices, shares

    def crop(self, index: int, rows: slice, columns: slice) -> np.ndarray:
        share = np.float32(self.shares[index])
        sharp = self.sharp.crop(index, rows, columns)
        output = self.outputs.crop(self.indices[index], rows, columns)
        return (sharp + share * (output.astype(np.float32) - sharp)).round().astype(np.uint8)


if __name__ == "__main__":
    run_cli(main)
