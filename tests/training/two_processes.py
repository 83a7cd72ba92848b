"""What each process of a torchrun does in test_distributed.py.

torchrun --nproc-per-node=2 tests/training/two_processes.py FOLDER
"""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # conftest.py, which finds the scripts
from conftest import fit, small_config
from torch import nn

import train
import utils
from cli import run_cli
from dataset import PairedImageDataset
from models import StudentCNN, TeacherCNN, copy_estimator, save_model
from training import report, run
from training.distributed import init_distributed, main_process_first, rank, world_size
from training.loop import load_batches, validate

STUDENT = dict(convs=2, num_experts=2, hidden=8)


def training(folder: Path, train_folder: str) -> None:
    """Twenty steps in float32, and the scores of the validation photos that each process sees."""
    utils.autocast_dtype = lambda device: torch.float32  # bfloat16 would round differently for each batch size
    device = init_distributed("cpu")
    with main_process_first():
        train_set = PairedImageDataset(folder / train_folder, 32)
        val_set = PairedImageDataset(folder / "val")
    torch.manual_seed(0)
    student = StudentCNN(**STUDENT)
    copy_estimator(TeacherCNN(4, 8, [8], 1), student)  # as train.py does
    config = small_config(batch_size=6, patches_per_photo=20, learning_rate=1e-3, resume=False)
    fit(student, train_set, val_set, config, folder / "best.pth", folder / "outputs")
    scores = validate(student, val_set, device)
    # The gradient of one batch: an optimizer that scales it would hide a sum in place of a mean
    torch.manual_seed(1)
    untrained = StudentCNN(**STUDENT)
    # With the zeros these start with, no layer before them has a gradient
    for layer in untrained.kernel_head, untrained.gain_map.tail, untrained.convs[-1].base, *untrained.convs:
        nn.init.normal_(layer.weight, std=0.1)
    for layer in untrained.estimator.tail, untrained.estimator.film:
        nn.init.normal_(layer.weight, std=0.02)
    wrapped = nn.parallel.DistributedDataParallel(untrained) if world_size() > 1 else untrained  # as TrainingRun does
    blurry, sharp, spectrum, _ = next(load_batches(train_set, device, range(99, 100), 6, 0))
    nn.functional.mse_loss(wrapped(blurry, spectrum), sharp).backward()
    gradients = {name: parameter.grad for name, parameter in untrained.named_parameters()}
    result = {"weights": student.state_dict(), "gradients": gradients, "scores": list(scores)}
    torch.save(result, folder / f"rank{rank()}.pth")


def whole(folder: Path) -> None:
    """All of train.py's main(), twice."""
    os.chdir(folder)
    constants = dict(NUM_EPOCHS=1, PATCH_SIZE=32, PATCHES_PER_PHOTO=4, BATCH_SIZE=2, DEVICE="cpu")
    vars(train).update(constants | dict(DATA=".", OUTPUTS="whole", REQUIRE_GOOD_TEACHER=False))
    vars(train).update(TEACHER_WEIGHTS="teacher.pth", StudentCNN=lambda: StudentCNN(**STUDENT))
    report.ms_per_megapixel = lambda network, device: 1.0  # which takes long
    with main_process_first():
        if rank() == 0:
            save_model("teacher.pth", TeacherCNN(4, 8, [8], 1))
    for _ in range(2):  # a finished training is followed by a new one on every rank
        train.main()


def main(folder: Path, bad: bool = False) -> None:
    # bad: only rank 1 sees the folder with the bad file, as if the machines held different data
    torch.set_num_threads(1)
    run.CHECK_EVERY = 2  # steps, so that loss and clock are checked within an epoch
    init_distributed("cpu")
    train_folder = "bad" if bad and rank() == 1 else "train"
    run_cli(lambda: (training(folder, train_folder), whole(folder)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
