"""Are blur estimates by region, and a map of the soft parts, worth it? Three small teachers, trained equally.

    python benchmarks/local_blur.py PHOTOS VAL_PHOTOS

Both are folders of sharp photos. The first network is the shipped one with fewer channels and blocks; the second has no
softness map; the third has one blur estimate for the whole photo. Their estimators are copies of the shipped teacher's. A
seam is a step between neighbouring pixels beyond that of a smooth ramp, in gray levels, where the network is given the ramp
with the blur of a half-blurred photo.
"""

import math
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import pretrain
from blur.camera import add_noise
from blur.filters import convolve, disk_kernel, gaussian_kernel
from blur.local import BlurMap
from blur.noise import chroma_noise, with_noise
from blur.spectrum import color_windows, log_power_spectrum
from cli import CliParser, run_cli, whole_number
from dataset import SyntheticBlurDataset
from images.photos import find_photos, read_photo
from inference import run_patches
from models import TeacherCNN, load_model
from training.config import TrainConfig
from training.run import TrainingRun
from utils import RelativeMSEAndSSIMLoss, make_generator, pick_device, psnr, quantize_8bit, ssim, to_tensor

WEIGHTS = Path(pretrain.__file__).parent / "weights" / "teacher.pth"
MAX_PSNR = 60.0  # dB, of a photo that comes back unchanged


class WithoutMap(TeacherCNN):
    """Is given both filters' results mixed evenly, and has to find out where to use which."""

    def forward(self, photo: Tensor, blur: BlurMap | Tensor | None = None) -> Tensor:
        if not isinstance(blur, BlurMap):
            blur = self.estimate_blur(photo) if blur is None else self.blur_of_patch(photo, blur)
        return super().forward(photo, blur._replace(softness=torch.full_like(blur.softness, 0.6)))


class WholePhotoTeacher(TeacherCNN):
    """Takes one blur for the whole photo, from its spectrum."""

    def estimate_blur(self, photo: Tensor, peak: float = 1.0) -> BlurMap:
        spectra = log_power_spectrum(photo, peak).repeat(1, 3, 1, 1)
        return self.blur_of_patch(photo / peak, with_noise(spectra, chroma_noise(color_windows(photo), peak)))

    def forward(self, photo: Tensor, blur: BlurMap | Tensor | None = None) -> Tensor:
        if torch.is_tensor(blur):
            blur = torch.cat([blur[:, 4:6].repeat(1, 3, 1, 1), blur[:, 6:]], 1)
        return super().forward(photo, blur)


DESIGNS = {
    "regions, soft parts, map": TeacherCNN,
    "regions, soft parts": WithoutMap,
    "whole photo": WholePhotoTeacher,
}


def main() -> None:
    parser = CliParser(__doc__)
    parser.add_argument("photos", type=Path)
    parser.add_argument("val_photos", type=Path)
    parser.add_argument("--steps", type=whole_number(1), default=1500)
    parser.add_argument("--shown", type=whole_number(1), default=20, help="photos to score on")
    options = parser.parse_args()
    device = pick_device()
    val = [to_tensor(read_photo(path)) for path in find_photos(options.val_photos)[: options.shown]]
    print("| blur | blurred alike | half blurred | nothing to do | largest seam |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        train_set = SyntheticBlurDataset(find_photos(options.photos), Path(folder) / "cache", 96)
        for name, kind in DESIGNS.items():
            torch.manual_seed(0)
            network = kind(width=16, deep_width=48, hidden=[48] * 4)
            network.estimator.load_state_dict(load_model(WEIGHTS).estimator.state_dict())
            train(network.to(device), train_set, options.steps, Path(folder) / name, device)
            cells = [gain(network.eval(), val, damage, device) for damage in (alike, half_blurred, untouched)]
            print(f"| {name} | {' | '.join(cells)} | {largest_seam(network, val[0], device):.2f} |")


def train(network: nn.Module, train_set: SyntheticBlurDataset, steps: int, outputs: Path, device: torch.device) -> None:
    """``pretrain.py``'s loop."""
    config = TrainConfig(
        num_epochs=1,
        patches_per_photo=math.ceil(steps * 8 / len(train_set)),
        batch_size=8,
        patch_size=96,
        learning_rate=1e-3,
        seed=0,
    )
    loss_fn, best = RelativeMSEAndSSIMLoss(), outputs / "best.pth"
    optimizer = torch.optim.AdamW(network.parameters(), config.learning_rate, weight_decay=1e-4, fused=True)
    run = TrainingRun(
        "teacher", network, optimizer, loss_fn, train_set, "", config, device, baselines={}, best_file=best, outputs=outputs
    )  # fmt: skip
    for blurry, sharp, spectra, input_mse in run.batches():
        run.step(loss_fn(run_patches(run.model, blurry, spectra).float(), sharp, input_mse))


def alike(photo: Tensor) -> Tensor:
    return add_noise(convolve(photo, gaussian_kernel(1.5)), 1.0, make_generator(0))


def half_blurred(photo: Tensor) -> Tensor:
    """The right half out of focus, behind a soft border."""
    right = torch.linspace(-photo.shape[-1] / 8, photo.shape[-1] / 8, photo.shape[-1]).add(0.5).clamp(0, 1)
    return add_noise(photo.lerp(convolve(photo, disk_kernel(3.0)), right), 1.0, make_generator(0))


def untouched(photo: Tensor) -> Tensor:
    return photo


@torch.no_grad()
def gain(network: nn.Module, photos: list[Tensor], damage, device: torch.device) -> str:
    """Mean gain over the damaged photos, or PSNR and SSIM where there was nothing to gain."""
    rows = []
    for sharp in photos:
        sharp, blurry = sharp[None].to(device), quantize_8bit(damage(sharp))[None].to(device)
        output = quantize_8bit(network(blurry))
        before, after = (torch.cat([psnr(x, sharp).clamp(max=MAX_PSNR), ssim(x, sharp)]) for x in (blurry, output))
        rows.append((after - (0 if damage is untouched else before)).tolist())
    decibels, similarity = np.mean(rows, axis=0)
    if damage is untouched:
        return f"{decibels:.1f} dB, {similarity:.4f}"
    return f"{decibels:+.2f} dB, {similarity:+.4f}"


@torch.no_grad()
def largest_seam(network: nn.Module, photo: Tensor, device: torch.device) -> float:
    blur = network.estimate_blur(half_blurred(photo)[None].to(device))
    height, width = photo.shape[-2:]
    x, y = torch.linspace(0.2, 0.8, width, device=device), torch.linspace(0, 0.1, height, device=device)
    ramp = (x + y[:, None]).expand(1, 3, -1, -1)  # oblique: runs of equal pixels are left as they are
    steps = network(ramp, blur).diff(dim=-1)[..., 40:-40]  # borders are reflected, which bends a ramp
    return float((steps - 0.6 / (width - 1)).abs().max()) * 255


if __name__ == "__main__":
    run_cli(main)
