"""Kills a training at random moments, resumes it, and compares its weights with those of one left alone.

    python tests/kill_and_resume.py --kills 10 --workers 2

Exit code 0 if they are the same to the last bit. The suite runs it with fewer kills. Linux and macOS only.
"""

import argparse
import csv
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import torch
import torch._dynamo  # which an optimizer would import, in two seconds, in each of the children

sys.path.insert(0, str(Path(__file__).parent.parent))
from conftest import fit, small_config, write_pair
from torch import nn

import training.run as training_run
from dataset import PairedImageDataset
from models import StudentCNN, load_model

EPOCHS = 2


def dropout_student() -> StudentCNN:
    student = StudentCNN(convs=2, num_experts=2, hidden=8)
    student.embed = nn.Sequential(*student.embed, nn.Dropout(0.1))
    student.estimator.requires_grad_(False)  # as train.py does
    return student


def training(folder: Path, name: str, workers: int, steps: int) -> None:
    """A short training of a small student with dropout: its random generator must be restored, too."""
    torch.manual_seed(0)
    student = dropout_student()
    train_set, val_set = PairedImageDataset(folder / "pairs", 16), PairedImageDataset(folder / "pairs")
    config = small_config(num_epochs=EPOCHS, batch_size=2, patches_per_photo=steps, num_workers=workers)
    fit(student, train_set, val_set, config, folder / name / "best.pth", folder / name)
    torch.save(student.state_dict(), folder / f"{name}.pth")


def in_a_process(folder: Path, name: str, workers: int, steps: int) -> int:
    """Start the training in a child of this process, which has done the slow import of torch already."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)  # so that a kill takes its workers along
        torch.set_num_threads(1)  # a forked process has no thread pool,
        os.environ["OMP_NUM_THREADS"] = "1"  # and must not ask for one when cores are idle
        sys.stdout = open(folder / f"{name}.log", "a")  # noqa: SIM115
        status = 1
        try:
            training(folder, name, workers, steps)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    return child


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    kill_and_resume(**vars(parser.parse_args()))


def kill_and_resume(kills: int, workers: int, seed: int) -> None:
    """Raises AssertionError if a training that was killed ``kills`` times differs from one that was left alone."""
    warnings.filterwarnings("ignore", "This DataLoader will create")  # on few cores
    rng = random.Random(seed)
    training_run.CHECK_EVERY, training_run.CHECKPOINT_SECONDS = 10, 0
    steps = 5 + 10 * kills  # per epoch: enough for a checkpoint between all kills
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for k in range(2):
            write_pair(folder / "pairs" / f"{k}", seed=k)
        start = time.monotonic()
        assert os.waitpid(in_a_process(folder, "alone", workers, steps), 0)[1] == 0, "the training itself failed"
        usual = time.monotonic() - start
        killed, patience = 0, 0.3
        while killed < kills:
            child = in_a_process(folder, "killed", workers, steps)
            last_file, seen = folder / "killed" / "student_checkpoint.pth", set()
            before = last_file.stat().st_mtime_ns if last_file.exists() else None
            deadline = time.monotonic() + 60
            while len(seen) < 2 and time.monotonic() < deadline:  # the one at its start, then one within the training
                if last_file.exists() and last_file.stat().st_mtime_ns != before:
                    seen.add(last_file.stat().st_mtime_ns)
                time.sleep(0.001)
            time.sleep(rng.uniform(0, patience) * usual)
            ended, status = os.waitpid(child, os.WNOHANG)
            if not ended:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
            if ended or not last_file.exists():  # it had finished: once more from the start, with less patience
                assert not ended or status == 0, "a run failed before it was killed"
                shutil.rmtree(folder / "killed")
                (folder / "killed.log").unlink()
                killed, patience = 0, patience / 2
                continue
            killed += 1
        assert os.waitpid(in_a_process(folder, "killed", workers, steps), 0)[1] == 0, "the last run failed"
        resumed = (folder / "killed.log").read_text()
        resumed = sum(int(step) > 0 for step in re.findall(r"training after step (\d+)", resumed))
        one, other = (torch.load(folder / f"{name}.pth", weights_only=True) for name in ("alone", "killed"))
        same = all(torch.equal(one[key], other[key]) for key in one)
        tables = []
        for name in "alone", "killed":
            best = load_model(folder / name / "best.pth", dropout_student())
            one |= {f"best {key}": value for key, value in best.state_dict().items()} if name == "alone" else {}
            other |= {f"best {key}": value for key, value in best.state_dict().items()} if name == "killed" else {}
            with open(folder / name / "student_epochs.csv") as file:
                tables.append([row | {"seconds": ""} for row in csv.DictReader(file)])
        same = same and one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
        print(f"{killed} kills, resumed from a checkpoint {resumed} times, weights {'the same' if same else 'DIFFER'}")
        assert same and killed and resumed == killed and tables[0] == tables[1] and len(tables[0]) == EPOCHS


if __name__ == "__main__":
    main()
