"""Kills a training at random moments, lets it go on, and compares its weights with those of one left alone.

    python tests/kill_and_resume.py --kills 10 --workers 2

Exit code 0 if they are the same to the last bit. The suite runs it with fewer kills. Linux and macOS only.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from conftest import write_pair
from torch import nn

from dataset import PairedImageDataset
from models import StudentCNN
from train import fit, sharp_photo

EPOCHS, STEPS = 2, 120


def training(folder: Path, name: str, workers: int) -> None:
    """A short training of a small student with dropout: its chance must go on where it was, too."""
    torch.manual_seed(0)
    student = StudentCNN(width=4, deep_width=8, convs=1)
    student.fine = nn.Sequential(student.fine, nn.Dropout(0.1))
    settings = dict(NUM_EPOCHS=EPOCHS, BATCH_SIZE=2, PATCHES_PER_PHOTO=STEPS, LEARNING_RATE=1e-2)
    machine = dict(device=torch.device("cpu"), outputs=folder / name, workers=workers, compiled=False)
    train_set, val_set = PairedImageDataset(folder / "pairs", 16), PairedImageDataset(folder / "pairs")
    best = folder / name / "best.pth"
    fit("student", student, sharp_photo, nn.MSELoss(), train_set, val_set, {}, best, settings,
        checkpoint_minutes=0, resume=True, **machine)  # fmt: skip
    torch.save(student.state_dict(), folder / f"{name}.pth")


def in_a_process(folder: Path, name: str, workers: int) -> int:
    """Start the training in a child of this process, which has done the slow import of torch already."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)  # so that a kill takes its workers along
        torch.set_num_threads(1)  # a forked process has no thread pool
        sys.stdout = open(folder / f"{name}.log", "a")  # noqa: SIM115
        status = 1
        try:
            training(folder, name, workers)
            status = 0
        finally:
            sys.stdout.flush()
            os._exit(status)
    return child


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for k in range(2):
            write_pair(folder / "pairs" / f"{k}", seed=k)
        start = time.monotonic()
        assert os.waitpid(in_a_process(folder, "alone", arguments.workers), 0)[1] == 0, "the training itself failed"
        usual = time.monotonic() - start
        kills = 0
        while True:
            child = in_a_process(folder, "killed", arguments.workers)
            if kills < arguments.kills:
                time.sleep(rng.uniform(0.1, 0.9) * usual)
            if kills == arguments.kills:
                assert os.waitpid(child, 0)[1] == 0, "the last run failed"
                break
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                assert status == 0, "a run failed before it was killed"
                break
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            kills += 1
        went_on = (folder / "killed.log").read_text().count("going on with the training")
        one, other = (torch.load(folder / f"{name}.pth", weights_only=True) for name in ("alone", "killed"))
        same = all(torch.equal(one[key], other[key]) for key in one)
        tables = [(folder / name / "student_epochs.csv").read_text().splitlines() for name in ("alone", "killed")]
        print(f"{kills} kills, went on from a checkpoint {went_on} times, weights {'the same' if same else 'DIFFER'}")
        assert same and kills and went_on and len(tables[0]) == len(tables[1]) == EPOCHS + 1


if __name__ == "__main__":
    main()
