"""Which student to take: designs after equal training, by what they gain and what a 1080p frame costs them.

    python benchmarks/student_designs.py DATA [PAIRS]

DATA holds train/ and val/ as train.py wants them. PAIRS is a folder of levels of pairs to score them on, as
evaluate.py takes it; without, the validation photos. Each design is trained by train.py's own loop for as many
steps, on what weights/teacher.pth answers, from one seed. Close other programs first.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

sys.path.insert(0, str(Path(__file__).parent.parent))
import train
from dataset import PairedImageDataset
from evaluate import find_levels
from gauge import BlurGauge, Steering, describe
from models import count_parameters, gmac_per_megapixel, load_model, pad_to_multiple, share_gauge
from processes import start_processes
from utils import autocast_dtype, run_script, seed_everything

WEIGHTS = Path(train.__file__).parent / "weights" / "teacher.pth"
# The numbers are channels at each scale, and how many convolutions there are
DESIGNS = {
    "two scales, 16 and 4 x 32, large kernels": dict(convs=4, large=True),
    "two scales, 16 and 2 x 32, large kernels": dict(large=True),
    "two scales, 16 and 3 x 32": dict(convs=3),
    "two scales, 16 and 2 x 32": dict(),
    "two scales, 16 and 1 x 32": dict(convs=1),
    "two scales, 8 and 3 x 32": dict(width=8, convs=3),
    "two scales, 8 and 2 x 32": dict(width=8),
    "two scales, 12 and 2 x 24": dict(width=12, deep=24),
    "two scales, 16 and 4 x 16": dict(deep=16, convs=4),
    "three scales, 16, 1 x 32 and 1 x 48": dict(convs=1, deepest=1),
    "three scales, 16, 2 x 16 and 2 x 48": dict(deep=16, deepest=2),
    "a quarter, 2 x 32": dict(width=0),
}


class Design(nn.Module):
    """Any of DESIGNS. The first kernel strides over the photo itself, which spares a shuffling of its pixels.

    Args:
        width: channels at half resolution; 0 for none of it.
        deep, convs: channels and convolutions at a quarter.
        deepest: convolutions of 48 channels at an eighth, after those at a quarter.
        large: the first and last kernels see 6x6 pixels of the photo, not 4x4.
    """

    describe = staticmethod(describe)

    def __init__(self, width: int = 16, deep: int = 32, convs: int = 2, deepest: int = 0, large: bool = False):
        super().__init__()
        self.two, self.large, self.folded = bool(width), large, False
        first, scale = (width, 2) if width else (deep, 4)
        self.head = nn.Conv2d(3, first, 6 if large else 2 * scale, scale, padding=2 if large else scale // 2)
        if width:
            self.down, self.up = nn.Conv2d(width, deep, 2, stride=2), nn.ConvTranspose2d(deep, width, 2, stride=2)
        self.deep = nn.ModuleList(nn.Conv2d(deep, deep, 3, padding=1) for _ in range(convs))
        self.deepest = nn.ModuleList(nn.Conv2d(48, 48, 3, padding=1) for _ in range(deepest))
        if deepest:
            self.down8, self.up8 = nn.Conv2d(deep, 48, 2, stride=2), nn.ConvTranspose2d(48, deep, 2, stride=2)
            self.steer8 = Steering(deepest, 48, hidden=32)
        self.gauge = BlurGauge()
        self.steer, self.steer_head = Steering(convs, deep, hidden=32), Steering(1, first, hidden=32)
        self.tail = nn.Conv2d(first, 3 * scale**2, 3 if large else 2, padding=1)
        nn.init.zeros_(self.tail.weight)
        nn.init.zeros_(self.tail.bias)

    def forward(self, photo: Tensor, description: Tensor | None = None) -> Tensor:
        x = pad_to_multiple(photo, 8)
        if not self.folded:
            description = describe(photo) if description is None else description
        code = None if self.folded else self.gauge(description)[1]
        first = self.layers([self.head], "steer_head", x, code)
        quarter = self.layers(self.deep, "steer", self.down(first) if self.two else first, code)
        if self.deepest:
            quarter = quarter + self.up8(self.layers(self.deepest, "steer8", self.down8(quarter), code))
        scale = 2 if self.two else 4
        change = F.pixel_shuffle(self.tail(F.relu_(first + self.up(quarter)) if self.two else quarter), scale)
        if not self.large:  # even kernels give a row and a column more, half a step around the photo
            change = change[..., scale // 2 : -(scale // 2), scale // 2 : -(scale // 2)]
        return (x + change)[..., : photo.shape[-2], : photo.shape[-1]]

    def layers(self, convs: nn.ModuleList, steering: str, x: Tensor, code: Tensor | None) -> Tensor:
        if self.folded:
            for conv in convs:
                x = F.relu_(conv(x))
            return x
        for conv, (scale, shift) in zip(convs, getattr(self, steering)(code), strict=True):
            inside = conv(x)
            inside = inside * scale.to(inside.dtype) + shift.to(inside.dtype)
            x = F.relu(inside if conv is self.head else x + inside)
        return x

    @torch.no_grad()
    def fold(self, description: Tensor) -> None:
        """Make scales, shifts and skips a part of the weights, for photos of one description."""
        code = self.gauge(description)[1]
        for convs, steering in ([self.head], "steer_head"), (self.deep, "steer"), (self.deepest, "steer8"):
            for conv, (scale, shift) in zip(convs, getattr(self, steering)(code) if convs else [], strict=True):
                conv.weight *= scale.view(-1, 1, 1, 1)
                conv.bias.mul_(scale.flatten()).add_(shift.flatten())
                if conv is not self.head:
                    conv.weight[:, :, 1, 1] += torch.eye(len(conv.weight), device=conv.weight.device)
        self.folded = True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("pairs", type=Path, nargs="?")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--only", nargs="+", default=list(DESIGNS), choices=list(DESIGNS), metavar="DESIGN")
    parser.add_argument("--levels", action="store_true", help="the gains on each level too")
    options = parser.parse_args()
    device = start_processes("auto")
    train_set = PairedImageDataset(options.data / "train", train.PATCH_SIZE)
    teacher = load_model(WEIGHTS).to(device)
    train_set.ask_once(teacher, device)
    pairs = options.pairs or options.data / "val"
    sets = {level: PairedImageDataset(folders[0].parent) for level, folders in find_levels(pairs).items()}
    blurry = {name: train.validate(nn.Identity(), pairs, device) for name, pairs in sets.items()}
    judged = [name for name, scores in blurry.items() if scores.psnr < train.PERFECT]
    print(f"{'design':48s} {'params':>7s} {'GMAC/MP':>7s} {'ms/1080p':>8s} {'gain dB':>8s} {'SSIM':>7s} {'unhurt dB':>9s}")
    for name in options.only:
        seed_everything(0)
        network = Design(**DESIGNS[name]).to(device, memory_format=torch.channels_last)
        share_gauge(teacher, network)
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
    batches = train.start_batches(train_set, device, range(steps), train.BATCH_SIZE, 0)
    train.train_one_epoch(
        network, train.as_given, nn.MSELoss(), batches, optimizer, schedule, device, "", range(steps), 0.0, lambda *_: None
    )
    network.eval()


@torch.inference_mode()
def ms_per_frame(network: nn.Module, device: torch.device) -> float:
    """Median over 9 runs on one 1920x1080 frame, float in and out, folded for its description."""
    frame = torch.rand(1, 3, 1080, 1920, device=device).to(memory_format=torch.channels_last)
    described, dtype, seconds = describe(frame), autocast_dtype(device), []
    network.fold(described)
    network, frame = network.to(dtype), frame.to(dtype)
    for _ in range(12):
        start = time.perf_counter()
        network(frame, described)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[3:])) * 1000


if __name__ == "__main__":
    run_script(main)
