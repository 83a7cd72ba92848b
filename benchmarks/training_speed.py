"""How much of a training's time is training: images per second of a plain loop, of train.py, and of the limit.

    python benchmarks/training_speed.py
    python benchmarks/training_speed.py --pairs 100 2000 --size 1280x720 --small-teacher --keep FOLDER

The plain loop decodes both PNGs for each patch, runs the teacher at every step, and computes in float32. The limit is
train.py's own step on a batch that is already in memory. All are measured in turns, round by round, on the same photos
and networks; medians of the rounds are printed. Close other programs first.
"""

import itertools
import resource
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import skimage
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).parent.parent))
import train
from blur.degradations import random_degradation
from cli import CliParser, image_size, run_cli, whole_number
from dataset import PairedImageDataset
from images.files import atomic
from inference import run_patches
from models import StudentCNN, TeacherCNN, copy_estimator, load_model
from training.config import TrainConfig
from training.run import TrainingRun
from training.teacher_cache import cache_blur_embeddings, cache_teacher_outputs
from utils import autocast, pick_device, relative_weight, to_pixels, to_tensor

WEIGHTS = Path(train.__file__).parent / "weights" / "teacher.pth"


def main() -> None:
    torch.manual_seed(0)
    parser = CliParser(__doc__)
    parser.add_argument("--pairs", type=whole_number(1), nargs="+", default=[100], help="numbers of pairs to measure with")
    parser.add_argument("--size", type=image_size, default="480x320", help="WIDTHxHEIGHT of the photos")
    parser.add_argument("--batch", type=whole_number(1), default=train.BATCH_SIZE)
    parser.add_argument("--patch", type=whole_number(1), default=train.PATCH_SIZE)
    parser.add_argument("--rounds", type=whole_number(1), default=5)
    parser.add_argument("--small-teacher", action="store_true", help="an untrained teacher, to fill the caches fast")
    parser.add_argument("--keep", type=Path, help="folder for the pairs, which are reused")
    arguments = parser.parse_args()
    if min(arguments.pairs) < arguments.batch:
        parser.error("--pairs is fewer than --batch: the plain loop would have no whole batch")
    height, width = arguments.size
    device = pick_device()
    with tempfile.TemporaryDirectory() as temporary:
        for count in arguments.pairs:
            folder = (arguments.keep or Path(temporary)) / f"{count}_{width}x{height}"
            make_pairs(folder, count, height, width)
            print(
                f"\n{count} pairs of {width}x{height}, batches of {arguments.batch} patches of {arguments.patch}, {device}"
            )
            teacher = TeacherCNN(8, 8, [8], 1) if arguments.small_teacher else load_model(WEIGHTS)
            teacher = teacher.to(device).eval().requires_grad_(False)
            measure(folder, teacher, device, arguments.batch, arguments.patch, arguments.rounds)


def measure(folder: Path, teacher: nn.Module, device: torch.device, batch_size: int, patch_size: int, rounds: int) -> None:
    start = time.perf_counter()
    train_set = PairedImageDataset(folder, patch_size)
    decoded = time.perf_counter()
    teacher.to(memory_format=torch.channels_last)
    train_set.targets = cache_teacher_outputs(teacher, train_set, 1.0, device)
    student = StudentCNN().to(device)
    copy_estimator(teacher, student)
    train_set.embeddings = cache_blur_embeddings(student, train_set, device)
    filled = time.perf_counter()
    for store in train_set.blurry, train_set.targets:  # into the system's memory, as after the first epochs
        for _ in store:
            pass

    loops = {
        "plain loop": PlainLoop(folder, teacher, device, batch_size, patch_size),
        "train.py": OurLoop(train_set, teacher, device, batch_size),
        "limit": OurLoop(train_set, teacher, device, batch_size, one_batch=True),
    }
    steps = {"plain loop": 4, "train.py": 100, "limit": 100}
    rates = {name: [] for name in loops}
    memory = 0
    for _ in range(rounds + 1):
        for name, loop in loops.items():
            start_loop = time.perf_counter()
            loop.run(steps[name])
            rates[name].append(steps[name] * batch_size / (time.perf_counter() - start_loop))
            if name == "train.py":
                memory = max(memory, resident_mb())
    middle = {name: float(np.median(values[1:])) for name, values in rates.items()}  # the first round warms up
    for name, values in rates.items():
        print(f"{name:10s} {middle[name]:8.1f} images/s   (rounds {min(values[1:]):.1f} to {max(values[1:]):.1f})")
    print(f"train.py / plain loop {middle['train.py'] / middle['plain loop']:6.1f}")
    print(f"train.py / limit      {middle['train.py'] / middle['limit']:6.2f}")
    one_pass = len(train_set) / middle["plain loop"]
    print(f"filling the caches: decoding {decoded - start:.1f} s, the rest {filled - decoded:.1f} s")
    patches = train.PATCHES_PER_PHOTO
    print(
        f"an epoch of the plain loop: {one_pass:.1f} s with one patch per photo, {patches * one_pass:.0f} s with {patches}"
    )
    print(f"resident memory while train.py's loop runs: {memory} MB")
    print_parts(train_set, teacher, device, batch_size)


class OurLoop:
    """The loop of train.py, on patches as they come or on one batch again and again."""

    def __init__(
        self, train_set: Dataset, teacher: nn.Module, device: torch.device, batch_size: int, one_batch: bool = False
    ):
        self.device, self.loss_fn = device, nn.MSELoss()
        self.student = StudentCNN().to(device, memory_format=torch.channels_last)
        copy_estimator(teacher, self.student)
        config = TrainConfig(1, 10**6, batch_size, train_set.patch_size, 1e-3, 0, resume=False)  # as good as endless
        self.outputs = tempfile.TemporaryDirectory()
        files = dict(best_file=Path(self.outputs.name) / "best.pth", outputs=self.outputs.name)
        optimizer = torch.optim.AdamW(self.student.parameters(), config.learning_rate, weight_decay=1e-4, fused=True)
        self.training = TrainingRun(
            "student", self.student, optimizer, self.loss_fn, train_set, "", config, device, baselines={}, **files
        )
        if one_batch:
            self.training.loader = itertools.repeat([part.to(device) for part in next(self.training.loader)])
        self.batches = self.training.batches()

    def run(self, steps: int) -> None:
        for blurry, target, blur, input_mse in itertools.islice(self.batches, steps):
            with autocast(self.device):
                prediction = run_patches(self.student, blurry, blur)
            prediction = prediction.float()
            prediction.register_hook(relative_weight(input_mse).mul)
            self.training.step(self.loss_fn(prediction, target))
        self.training.loss_sum.item()  # on a GPU this waits for all that it was given to do


class PlainPairs(Dataset):
    """What most repositories do: open, decode and crop both files for each patch."""

    def __init__(self, folder: Path, patch_size: int):
        self.folders, self.patch_size = sorted(p for p in folder.iterdir() if not p.name.startswith(".")), patch_size

    def __len__(self) -> int:
        return len(self.folders)

    def __getitem__(self, index: int):
        blurry, sharp = (
            to_tensor(np.array(Image.open(self.folders[index] / f"{name}.png").convert("RGB")))
            for name in ("blurry", "sharp")
        )
        top, left = (int(torch.randint(length - self.patch_size + 1, ())) for length in blurry.shape[1:])
        rows, columns = slice(top, top + self.patch_size), slice(left, left + self.patch_size)
        return blurry[:, rows, columns], sharp[:, rows, columns]


class PlainLoop:
    def __init__(self, folder: Path, teacher: nn.Module, device: torch.device, batch_size: int, patch_size: int):
        self.teacher, self.device, self.student = teacher, device, StudentCNN().to(device)
        copy_estimator(teacher, self.student)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), 1e-3)
        loader = DataLoader(PlainPairs(folder, patch_size), batch_size, shuffle=True, drop_last=True)
        self.batches = itertools.chain.from_iterable(iter(loader) for _ in itertools.count())

    def run(self, steps: int) -> None:
        for blurry, _ in itertools.islice(self.batches, steps):
            blurry = blurry.to(self.device)
            with torch.no_grad():
                target = self.teacher(blurry)
            loss = nn.functional.mse_loss(self.student(blurry), target)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            loss.item()


def print_parts(train_set: Dataset, teacher: nn.Module, device: torch.device, batch_size: int, steps: int = 60) -> None:
    """Where a step's time goes, in milliseconds; the parts are waited for one by one, so a GPU overlaps less."""
    loop = OurLoop(train_set, teacher, device, batch_size)
    student, optimizer = loop.student, loop.training.optimizer
    spent = dict.fromkeys(["cutting patches", "forward and loss", "backward", "clipping and optimizer"], 0.0)

    def timed(part: str, work):
        start = time.perf_counter()
        result = work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        spent[part] += time.perf_counter() - start
        return result

    def forward(batch):
        with autocast(device):
            prediction = student(batch[0], batch[2])
        return nn.functional.mse_loss(prediction.float(), batch[1])

    def load():
        return next(loop.batches)

    def update():
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(steps):
        loss = timed("forward and loss", lambda: forward(timed("cutting patches", load)))
        timed("backward", loss.backward)
        timed("clipping and optimizer", update)
    spent["forward and loss"] -= spent["cutting patches"]  # which ran inside it
    print("a step: " + ", ".join(f"{part} {seconds / steps * 1000:.2f} ms" for part, seconds in spent.items()))


def make_pairs(folder: Path, count: int, height: int, width: int) -> None:
    """Pairs with the detail of real photos, from scikit-image's sample photos; kept if they are there.

    Beyond 100 they are copies of files: as slow to decode and as large in memory as any others.
    """
    samples = [
        Image.open(Path(skimage.__file__).parent / "data" / name) for name in ("astronaut.png", "coffee.png", "chelsea.png")
    ]
    large = [sample.convert("RGB").resize((2 * width, 2 * height), Image.Resampling.BICUBIC) for sample in samples]

    def make(k: int) -> None:
        pair = folder / f"{k:05d}"
        if (pair / "blurry.png").is_file():
            return
        rng = np.random.default_rng(k)
        left, top = int(rng.integers(width)), int(rng.integers(height))
        sharp = np.array(large[k % len(large)].crop((left, top, left + width, top + height)))
        sharp = (sharp + rng.integers(0, 6, sharp.shape)).clip(0, 255).astype(np.uint8)  # the grain of a sensor
        blurry = to_pixels(random_degradation(to_tensor(sharp), torch.Generator().manual_seed(k))[0])
        pair.mkdir(parents=True, exist_ok=True)
        for name, pixels in ("sharp.png", sharp), ("blurry.png", blurry):
            with atomic(pair / name) as partial:
                Image.fromarray(pixels).save(partial, compress_level=3)

    def copy(k: int) -> None:
        pair, source = folder / f"{k:05d}", folder / f"{k % 100:05d}"
        pair.mkdir(exist_ok=True)
        for name in ("sharp.png", "blurry.png"):
            if not (pair / name).is_file():
                with atomic(pair / name) as partial:
                    shutil.copyfile(source / name, partial)

    with ThreadPoolExecutor() as pool:
        list(pool.map(make, range(min(count, 100))))
        list(pool.map(copy, range(100, count)))


def resident_mb() -> int:
    """Resident memory of this process now, in MB; 0 where the system does not tell as Linux does."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * resource.getpagesize() // 10**6


if __name__ == "__main__":
    run_cli(main)
