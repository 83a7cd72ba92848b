"""Compares designs of the student after equal training: what they gain, and what a 1080p frame costs.

    python benchmarks/student_designs.py DATA [PAIRS]

DATA contains train/ and val/ as for train.py. PAIRS is a folder of degradations to score on, as for evaluate.py; by default
the validation photos. Each design is trained by train.py's loop for as many steps, on the outputs of
weights/teacher.pth, from one seed, with the teacher's blur estimator. A frame's time is that of FusedStudent, 8-bit pixels
to 8-bit pixels. Close other programs first.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

sys.path.insert(0, str(Path(__file__).parent.parent))
import train
from blur.estimator import EMBEDDING
from blur.noise import NOISE_FEATURES
from cli import CliParser, run_cli, whole_number
from dataset import PairedImageDataset
from evaluate import find_degradations
from fused_student import FusedStudent
from inference import run_patches
from models import StudentCNN, StudentWeights, copy_estimator, load_model
from training.config import TrainConfig
from training.loop import validate
from training.run import TrainingRun
from training.teacher_cache import cache_teacher_outputs
from utils import MAX_PSNR, autocast, count_parameters, gmac_per_megapixel, pick_device, relative_weight

WEIGHTS = Path(train.__file__).parent / "weights" / "teacher.pth"


class WithoutFilter(StudentCNN):
    """Convolutions with experts alone."""

    def predict_weights(self, embedded: Tensor) -> StudentWeights:
        weights = super().predict_weights(embedded)
        return weights._replace(kernels=torch.zeros_like(weights.kernels))


class OwnFilter(StudentCNN):
    """The filters are predicted from the blur embedding alone: those of the estimator are replaced by the identity."""

    def embed_blur(self, spectra: Tensor) -> Tensor:
        embedded = super().embed_blur(spectra)
        filters = embedded[:, :-NOISE_FEATURES].unflatten(1, (2, -1))[..., EMBEDDING:-16]
        filters.zero_()[..., -1] = 1  # the center
        return embedded


class OneFilter(StudentCNN):
    """The same all over the photo: the whole photo's filter and the convolutions."""

    def __init__(self):
        super().__init__()
        self.gain_map.tail.requires_grad_(False)
        self.gain_map.gate.data = torch.tensor([0.0, -20.0])
        self.gain_map.gate.requires_grad_(False)


DESIGNS = {
    "filters and 1 convolution": lambda: StudentCNN(convs=1),
    "filters and 2 convolutions (shipped)": StudentCNN,
    "filters and 3 convolutions": lambda: StudentCNN(convs=3),
    "filters and 4 convolutions": lambda: StudentCNN(convs=4),
    "shipped, 1 expert": lambda: StudentCNN(num_experts=1),
    "shipped, 24 experts": lambda: StudentCNN(num_experts=24),
    "shipped, without the filters": WithoutFilter,
    "shipped, without the estimator's filters": OwnFilter,
    "shipped, the same all over": OneFilter,
}


def main() -> None:
    parser = CliParser(__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("pairs", type=Path, nargs="?")
    parser.add_argument("--steps", type=whole_number(1), default=2000)
    parser.add_argument("--only", nargs="+", default=list(DESIGNS), choices=list(DESIGNS), metavar="DESIGN")
    parser.add_argument("--each", action="store_true", help="the gains on each degradation, too")
    options = parser.parse_args()
    device = pick_device()
    train_set = PairedImageDataset(options.data / "train", train.PATCH_SIZE)
    teacher = load_model(WEIGHTS).to(device)
    train_set.targets = cache_teacher_outputs(teacher, train_set, 1.0, device)
    pairs = options.pairs or options.data / "val"
    sets = {name: PairedImageDataset(folders[0].parent) for name, folders in find_degradations(pairs).items()}
    blurry = {name: validate(nn.Identity(), pairs, device) for name, pairs in sets.items()}
    judged = [name for name, scores in blurry.items() if scores.psnr < MAX_PSNR]
    print(f"{'design':48s} {'params':>7s} {'GMAC/MP':>7s} {'ms/1080p':>8s} {'gain dB':>8s} {'SSIM':>7s} {'sharp dB':>9s}")
    for name in options.only:
        torch.manual_seed(0)
        network = DESIGNS[name]().to(device, memory_format=torch.channels_last)
        copy_estimator(teacher, network)
        train_student(network, train_set, options.steps, device)
        scores = {name: validate(network, pairs, device) for name, pairs in sets.items()}
        gains = {n: (scores[n].psnr - blurry[n].psnr, scores[n].ssim - blurry[n].ssim) for n in judged}
        gain, kept = np.mean(list(gains.values()), axis=0), [scores[n].psnr for n in scores if n not in judged]
        print(
            f"{name:48s} {count_parameters(network):7d} {gmac_per_megapixel(network):7.2f} "
            f"{ms_per_frame(network, device):8.1f} {gain[0]:+8.3f} {gain[1]:+7.4f} {np.mean(kept or np.nan):9.1f}",
            flush=True,
        )
        if options.each:
            print("    " + ", ".join(f"{name} {psnr:+.2f} {ssim:+.4f}" for name, (psnr, ssim) in gains.items()), flush=True)


def train_student(network: nn.Module, train_set: Dataset, steps: int, device: torch.device) -> None:
    """About ``steps`` steps of train.py's loop: as many patches from each photo."""
    patches = max(1, steps * train.BATCH_SIZE // len(train_set))
    config = TrainConfig(1, patches, train.BATCH_SIZE, train_set.patch_size, train.LEARNING_RATE, 0, resume=False)
    optimizer = torch.optim.AdamW(network.parameters(), config.learning_rate, weight_decay=1e-4, fused=True)
    loss_fn = nn.MSELoss()
    with tempfile.TemporaryDirectory() as folder:
        files = dict(best_file=f"{folder}/best.pth", outputs=folder)
        with TrainingRun(
            "student", network, optimizer, loss_fn, train_set, "", config, device, baselines={}, **files
        ) as run:
            for blurry, target, blur, input_mse in run.batches():
                with autocast(device):
                    prediction = run_patches(network, blurry, blur)
                prediction = prediction.float()
                prediction.register_hook(relative_weight(input_mse).mul)
                run.step(loss_fn(prediction, target))
            network.load_state_dict(run.averaged.state_dict())  # what train.py keeps


@torch.inference_mode()
def ms_per_frame(network: StudentCNN, device: torch.device) -> float:
    """Median over 15 runs on one 1920x1080 frame."""
    picture, seconds = torch.randint(0, 256, (1080, 1920, 3), dtype=torch.uint8, device=device), []
    fused = FusedStudent(network)
    for _ in range(18):
        start = time.perf_counter()
        fused(picture)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[3:])) * 1000


if __name__ == "__main__":
    run_cli(main)
