"""Which student to take: designs after equal training, by what they gain and what a 1080p frame costs them.

    python benchmarks/student_designs.py DATA [PAIRS]

DATA holds train/ and val/ as train.py wants them. PAIRS is a folder of levels of pairs to score them on, as
evaluate.py takes it; without, the validation photos. Each design is trained by train.py's own loop for as many
steps, on what weights/teacher.pth answers, from one seed, with the teacher's gauge. A frame's time is that of FastStudent,
8-bit picture to 8-bit picture; of designs that it does not know, of their layers alone. Close other programs first.
"""

import itertools
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

sys.path.insert(0, str(Path(__file__).parent.parent))
from utils_MISSING import seed_everything

import train
from blur.estimator import BlurEstimator
from blur.spectrum import log_power_spectrum
from cli import CliParser, run_cli, whole_number
from dataset import PairedImageDataset
from evaluate import find_degradations
from inference import FusedStudent
from models import CondConv2d, StudentCNN, load_model, pad_to_multiple, share_estimator
from training.distributed import init_distributed
from utils import count_parameters, gmac_per_megapixel, zero_init

WEIGHTS = Path(train.__file__).parent / "weights" / "teacher.pth"


class WithoutFilter(StudentCNN):
    """Convolutions with variants alone."""

    def predict_kernel_and_routing(self, convolve: Tensor) -> tuple[Tensor, Tensor]:
        kernel, mix = super().predict_kernel_and_routing(convolve)
        return torch.zeros_like(kernel), mix


class OwnFilter(StudentCNN):
    """The filter is made from what the gauge says; the gauge's own filter is not added to it."""

    def __init__(self):
        super().__init__()
        self.window.data.zero_()
        self.window.requires_grad_(False)


class InColour(nn.Module):
    """``convs`` convolutions with variants on squares of 4x4 pixels in colour: 48 channels in and out, ``width`` between."""

    log_power_spectrum = staticmethod(log_power_spectrum)

    def __init__(self, width: int = 32, convs: int = 3, num_experts: int = 10):
        super().__init__()
        self.estimator, self.mix = BlurEstimator(), nn.Linear(64, num_experts)
        widths = [48, *[width] * (convs - 1), 48]
        bases = [nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths)]
        zero_init(bases[-1])
        self.convs = nn.ModuleList(CondConv2d(base, num_experts) for base in bases)

    def forward(self, photo: Tensor, spectrum: Tensor | None = None) -> Tensor:
        mix = self.mix(self.estimator(log_power_spectrum(photo) if spectrum is None else spectrum)[1]).tanh()
        x = F.pixel_unshuffle(pad_to_multiple(photo, 4), 4)
        for conv in self.convs[:-1]:
            x = F.relu(conv(x, mix))
        return photo + F.pixel_shuffle(self.convs[-1](x, mix), 4)[..., : photo.shape[-2], : photo.shape[-1]]


class TwoScales(nn.Module):
    """16 channels at half resolution, ``convs`` convolutions of 32 at a quarter: an earlier student."""

    log_power_spectrum = staticmethod(log_power_spectrum)

    def __init__(self, convs: int = 1, num_experts: int = 10):
        super().__init__()
        self.estimator, self.mix = BlurEstimator(), nn.Linear(64, num_experts)
        self.head = nn.Conv2d(3, 16, 6, stride=2, padding=2)
        self.down, self.up = nn.Conv2d(16, 32, 2, stride=2), nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.deep = nn.ModuleList(CondConv2d(nn.Conv2d(32, 32, 3, padding=1), num_experts) for _ in range(convs))
        self.tail = CondConv2d(zero_init(nn.Conv2d(16, 12, 2, padding=1)), num_experts)

    def forward(self, photo: Tensor, spectrum: Tensor | None = None) -> Tensor:
        mix = self.mix(self.estimator(log_power_spectrum(photo) if spectrum is None else spectrum)[1]).tanh()
        x = pad_to_multiple(photo, 4)
        half = F.relu(self.head(x))
        quarter = self.down(half)
        for conv in self.deep:
            quarter = F.relu(quarter + conv(quarter, mix))
        half = F.relu(half + self.up(quarter))
        x = x + F.pixel_shuffle(self.tail(half, mix), 2)[..., 1:-1, 1:-1]
        return x[..., : photo.shape[-2], : photo.shape[-1]]


DESIGNS = {
    "filter and 1 convolution": lambda: StudentCNN(convs=1),
    "filter and 2 convolutions": lambda: StudentCNN(convs=2),
    "filter and 3 convolutions (shipped)": StudentCNN,
    "filter and 4 convolutions": lambda: StudentCNN(convs=4),
    "filter and 6 convolutions": lambda: StudentCNN(convs=6),
    "shipped, 1 variant": lambda: StudentCNN(num_experts=1),
    "shipped, 24 variants": lambda: StudentCNN(num_experts=24),
    "shipped, without the filter": WithoutFilter,
    "shipped, filter without the gauge's own": OwnFilter,
    "squares in colour, 32 wide, no filter": InColour,
    "two scales, 16 and 1 x 32, no filter": TwoScales,
    "two scales, 16 and 2 x 32, no filter": lambda: TwoScales(convs=2),
}


def main() -> None:
    parser = CliParser(__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("pairs", type=Path, nargs="?")
    parser.add_argument("--steps", type=whole_number(1), default=2000)
    parser.add_argument("--only", nargs="+", default=list(DESIGNS), choices=list(DESIGNS), metavar="DESIGN")
    parser.add_argument("--levels", action="store_true", help="the gains on each level too")
    options = parser.parse_args()
    device = init_distributed("auto")
    train_set = PairedImageDataset(options.data / "train", train.PATCH_SIZE)
    teacher = load_model(WEIGHTS).to(device)
    train_set.cache_teacher_outputs(teacher, device)
    pairs = options.pairs or options.data / "val"
    sets = {level: PairedImageDataset(folders[0].parent) for level, folders in find_degradations(pairs).items()}
    blurry = {name: train.validate(nn.Identity(), pairs, device) for name, pairs in sets.items()}
    judged = [name for name, scores in blurry.items() if scores.psnr < train.MAX_PSNR]
    print(f"{'design':48s} {'params':>7s} {'GMAC/MP':>7s} {'ms/1080p':>8s} {'gain dB':>8s} {'SSIM':>7s} {'unhurt dB':>9s}")
    for name in options.only:
        seed_everything(0)
        network = DESIGNS[name]().to(device, memory_format=torch.channels_last)
        share_estimator(teacher, network)
        teach(network, train_set, options.steps, device)
        scores = {level: train.validate(network, pairs, device) for level, pairs in sets.items()}
        gains = {n: (scores[n].psnr - blurry[n].psnr, scores[n].ssim - blurry[n].ssim) for n in judged}
        gain, kept = np.mean(list(gains.values()), axis=0), [scores[n].psnr for n in scores if n not in judged]
        print(
            f"{name:48s} {count_parameters(network):7d} {gmac_per_megapixel(network):7.2f} "
            f"{ms_per_frame(network, device):8.1f} {gain[0]:+8.3f} {gain[1]:+7.4f} {np.mean(kept or np.nan):9.1f}",
            flush=True,
        )
        if options.levels:
            print(
                "    " + ", ".join(f"{level} {psnr:+.2f} {ssim:+.4f}" for level, (psnr, ssim) in gains.items()), flush=True
            )


def teach(network: nn.Module, train_set: Dataset, steps: int, device: torch.device) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), train.LEARNING_RATE, weight_decay=1e-4, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: train.warmup_cosine(step, steps))
    batches = train.load_batches(train_set, device, range(steps), train.BATCH_SIZE, 0)
    train.train_one_epoch(
        network, train.as_given, nn.MSELoss(), batches, optimizer, schedule, device, "", range(steps), 0.0, lambda *_: None
    )
    network.eval()


@torch.inference_mode()
def ms_per_frame(network: nn.Module, device: torch.device) -> float:
    """Median over 15 runs on one 1920x1080 frame."""
    picture = torch.randint(0, 256, (1080, 1920, 3), dtype=torch.uint8, device=device)
    photo, seconds = picture.movedim(-1, 0)[None].float() / 255, []
    described = log_power_spectrum(photo)
    run = FusedStudent(network) if isinstance(network, StudentCNN) else None
    for _ in range(18):
        start = time.perf_counter()
        run(picture) if run else network(photo, described)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[3:])) * 1000


if __name__ == "__main__":
    run_cli(main)
