"""What each process of a torchrun does in test_processes.py.

torchrun --nproc-per-node=2 tests/two_processes.py FOLDER
"""

import contextlib
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from torch import nn

import report
import train
from dataset import PairedImageDataset
from models import StudentCNN, TeacherCNN, share_estimator
from processes import wrap_distributed, main_process_first, rank, init_distributed
from utils import run_cli

STUDENT = dict(convs=2, num_experts=2, hidden=8)


def training(folder: Path, train_folder: str) -> None:
    """Twenty steps in float32, and the scores of the validation photos that each process sees."""
    train.autocast = lambda device: contextlib.nullcontext()  # bfloat16 would round differently for each size of batch
    device = init_distributed("cpu")
    train_set = main_process_first(lambda: PairedImageDataset(folder / train_folder, 32))
    val_set = main_process_first(lambda: PairedImageDataset(folder / "val"))
    torch.manual_seed(0)
    student = StudentCNN(**STUDENT)
    share_estimator(TeacherCNN(4, 8, 1, 1), student)  # as train.py does
    settings = dict(NUM_EPOCHS=2, BATCH_SIZE=6, PATCHES_PER_PHOTO=20, LEARNING_RATE=1e-3)
    machine = dict(device=device, outputs=folder / "outputs", workers=0, compiled=False, checkpoint_minutes=5, resume=False)
    best = folder / "best.pth"
    train.fit("student", student, train.as_given, nn.MSELoss(), train_set, val_set, {}, best, settings, **machine)
    scores = train.validate(student, val_set, device)
    # The gradient of one batch: an optimizer that scales it would hide a sum in place of a mean
    torch.manual_seed(1)
    untrained = StudentCNN(**STUDENT)
    # With the zeros these start with, no layer before them has a gradient
    for layer in untrained.make, untrained.convs[-1].base, *untrained.convs:
        nn.init.normal_(layer.weight, std=0.1)
    for layer in untrained.estimator.tail, untrained.estimator.steer:
        nn.init.normal_(layer.weight, std=0.02)
    wrapped = wrap_distributed(untrained, device)  # kept: without it the gradients would not be averaged
    blurry, sharp, spectrum = next(train.start_batches(train_set, device, range(99, 100), 6, 0))
    nn.functional.mse_loss(wrapped(blurry, spectrum), sharp).backward()
    gradients = {name: parameter.grad for name, parameter in untrained.named_parameters()}
    result = {"weights": student.state_dict(), "gradients": gradients, "scores": list(scores)}
    torch.save(result, folder / f"rank{rank()}.pth")


def whole(folder: Path) -> None:
    """All of train.py's main(): a teacher first, then a student."""
    os.chdir(folder)
    settings = dict(NUM_EPOCHS=1, PATCH_SIZE=32, PATCHES_PER_PHOTO=4, BATCH_SIZE=2, TEACHER_WEIGHTS=None, DEVICE="cpu")
    vars(train).update(settings | dict(DATA=".", OUTPUTS="whole", REQUIRE_GOOD_TEACHER=False))
    report.ms_per_megapixel = lambda network, device: 1.0  # which takes longer than all the rest
    train.TeacherCNN = lambda: TeacherCNN(4, 8, 1, 1)
    train.StudentCNN = lambda: StudentCNN(**STUDENT)
    for _ in range(2):  # a finished training is followed by a new one on every rank
        train.main()


def main(folder: Path, bad: bool = False) -> None:
    # bad: only rank 1 sees the folder with the bad file, as if the machines held different data
    torch.set_num_threads(1)
    init_distributed("cpu")
    train_folder = "bad" if bad and rank() == 1 else "train"
    run_cli(lambda: (training(folder, train_folder), whole(folder)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
