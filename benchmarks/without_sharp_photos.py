"""Can a student learn one camera without a single sharp photo? Trained on the teacher's outputs for blurry photos alone.

    python benchmarks/without_sharp_photos.py PHOTOS VAL_PHOTOS

The camera is simulated: a lens that is soft in one direction, much noise, JPEG. Of PHOTOS only what it makes is kept; the
pairs made of VAL_PHOTOS judge. A student trained for this camera alone is compared with the shipped one.
"""

import math
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from student_designs import WEIGHTS, train_student

from blur.camera import add_noise, jpeg
from blur.filters import convolve, gaussian_kernel
from cli import CliParser, run_cli, whole_number
from dataset import PairedImageDataset
from images.photos import find_photos, read_photo
from models import StudentCNN, copy_estimator, load_model
from train import PATCH_SIZE
from training.loop import validate
from training.teacher_cache import cache_blur_embeddings, cache_teacher_outputs
from utils import make_generator, pick_device, to_pixels, to_tensor

SIGMAS, ANGLE = (2.2, 1.2), math.radians(30)  # pixels, of the blur along ANGLE and across it
NOISE, QUALITY = 8.0, 85  # standard deviation in gray levels; of JPEG
LARGEST = 480  # pixels; larger photos are cropped


def main() -> None:
    parser = CliParser(__doc__)
    parser.add_argument("photos", type=Path)
    parser.add_argument("val_photos", type=Path)
    parser.add_argument("--steps", type=whole_number(1), default=6000)
    parser.add_argument("--count", type=whole_number(1), default=200, help="photos to train on")
    parser.add_argument("--orientations", type=whole_number(1, 8), default=1, help="over which the outputs are averaged")
    options = parser.parse_args()
    device = pick_device()
    teacher = load_model(WEIGHTS).to(device, memory_format=torch.channels_last)
    with tempfile.TemporaryDirectory() as folder:
        for part, photos in ("train", options.photos), ("val", options.val_photos):
            for k, path in enumerate(find_photos(photos)[: options.count]):
                take_photo(path, Path(folder) / part / f"{k:03d}", k, with_sharp=part == "val")
        train_set = PairedImageDataset(Path(folder) / "train", PATCH_SIZE, need_sharp=False)
        val_set = PairedImageDataset(Path(folder) / "val")
        train_set.targets = cache_teacher_outputs(teacher, train_set, 1.0, device, options.orientations)
        torch.manual_seed(0)
        adapted = StudentCNN()
        copy_estimator(teacher, adapted)
        adapted.to(device, memory_format=torch.channels_last)
        train_set.embeddings = cache_blur_embeddings(adapted, train_set, device)
        train_student(adapted, train_set, options.steps, device)
        shipped = load_model(WEIGHTS.with_name("student.pth")).to(device, memory_format=torch.channels_last)
        print(f"{len(train_set)} blurry photos to train on, {len(val_set)} pairs to judge")
        networks = {"input": nn.Identity(), "shipped student": shipped, "camera's student": adapted, "teacher": teacher}
        for name, network in networks.items():
            scores = validate(network, val_set, device)
            print(f"{name:17s} {scores.psnr:6.2f} dB  SSIM {scores.ssim:.4f}", flush=True)


def take_photo(path: Path, folder: Path, number: int, with_sharp: bool) -> None:
    """What the camera makes of the middle of a sharp photo: blurry.png and, if wanted, sharp.png."""
    photo = to_tensor(read_photo(path))
    top, left = (max(0, (length - LARGEST) // 2) for length in photo.shape[1:])
    sharp = photo[:, top : top + LARGEST, left : left + LARGEST]
    folder.mkdir(parents=True)
    Image.fromarray(to_pixels(camera(sharp, make_generator(number)))).save(folder / "blurry.png")
    if with_sharp:
        Image.fromarray(to_pixels(sharp)).save(folder / "sharp.png")


def camera(photo: Tensor, generator: torch.Generator) -> Tensor:
    blurry = convolve(photo, gaussian_kernel(*SIGMAS, ANGLE))
    return jpeg(add_noise(blurry, NOISE, generator).clamp(0, 1), QUALITY)


if __name__ == "__main__":
    run_cli(main)
