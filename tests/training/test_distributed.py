"""Two processes, with the environment that torchrun sets on the CPU, train and validate as one does."""

import os
import shutil
import socket

import pytest
import torch
import two_processes

import utils
from cli import run_cli
from dataset import PairedImageDataset
from models import StudentCNN, load_model
from training import config, distributed, loop
from training.distributed import all_ranks_together, gather
from training.teacher_cache import cache_teacher_outputs
from utils import Scores, UserError


def of_two(rank, port, folder, bad):
    """Set what torchrun sets for a process, without the seconds that its own imports of torch take."""
    os.environ.update(RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=f"{port}")
    two_processes.main(folder, bad)


def run_two(start, folder, bad):
    """Exit codes of two processes, and what they printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [start(of_two, rank, port, folder, bad, log=folder / "log") for rank in range(2)]
    for process in both:
        process.join(120)
    return [process.exitcode for process in both], (folder / "log").read_text()


def test_two_processes_match_one(pairs, start, monkeypatch):
    exit_codes, printed = run_two(start, pairs, bad=False)
    assert exit_codes == [0, 0], printed
    assert printed.count("student 1/2") == 1, "rank 0 alone prints"
    assert printed.count("student 1/1") == 2, "main() runs twice"
    assert printed.count("The best student is in best_student_model.pth") == 2
    (outputs,) = (pairs / "train" / ".cache").glob("*.outputs")  # of the teacher, half of them from each process
    first, second = (torch.load(pairs / f"rank{r}.pth", weights_only=True) for r in range(2))
    monkeypatch.setattr(utils, "autocast_dtype", utils.autocast_dtype)  # restored afterwards
    two_processes.training(pairs, "train")  # one process, this one
    shares, train_set = outputs.read_bytes(), PairedImageDataset(pairs / "train", 32)
    outputs.unlink()
    cache_teacher_outputs(load_model(pairs / "teacher.pth"), train_set, 1.0, torch.device("cpu"), 8)
    assert outputs.read_bytes() == shares and not list(outputs.parent.glob("*of2*"))
    one = torch.load(pairs / "rank0.pth", weights_only=True)
    start = StudentCNN(**two_processes.STUDENT).state_dict()
    assert any((one["weights"][name] - value).abs().max() > 1e-3 for name, value in start.items()), "it has learnt"
    for name, value in one["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name])
        torch.testing.assert_close(first["weights"][name], value, atol=1e-5, rtol=0)
    for name, value in one["gradients"].items():
        assert value.abs().max() > 0 and (first["gradients"][name] - value).abs().max() < 1e-3 * value.abs().max()
    # each photo scored exactly once: a photo twice or never would change the mean
    torch.testing.assert_close(torch.tensor(first["scores"]), torch.tensor(one["scores"]), atol=1e-4, rtol=0)
    assert first["scores"] == second["scores"]


def test_a_bad_file_on_one_rank_ends_both_with_its_sentence(pairs, start):
    shutil.copytree(pairs / "train", pairs / "bad")
    (pairs / "bad" / "002" / "blurry.png").write_text("no picture")
    exit_codes, printed = run_two(start, pairs, bad=True)
    assert exit_codes == [1, 1] and printed.count("error: ") == 1, printed
    assert "bad/002/blurry.png cannot be read as an image" in printed and "Traceback" not in printed


class HalfUsed(StudentCNN):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.spare = torch.nn.Linear(2, 2)


def test_weights_that_no_photo_reaches_are_said_before_two_processes_wait_for_them(monkeypatch):
    monkeypatch.setattr("models.HalfUsed", HalfUsed, raising=False)
    monkeypatch.setattr(config, "world_size", lambda: 2)
    with pytest.raises(UserError, match="HalfUsed does not use spare.weight, spare.bias, which torchrun does not allow"):
        config.check_network(HalfUsed(**two_processes.STUDENT))


def test_an_error_of_another_process_is_raised_where_this_one_waits_for_it(monkeypatch):
    sent = []

    def from_two(values, value):
        sent.append(value)
        values[:] = [value, UserError("the other says so")]

    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed.dist, "all_gather_object", from_two)
    with pytest.raises(UserError, match="the other says so") as caught, all_ranks_together():
        gather("an output")
    assert caught.value.shared and sent == ["an output"], "it is not sent once more"


def test_what_all_ranks_find_wrong_is_printed_once(monkeypatch):
    def from_two(values, value):
        values[:] = [value, value]

    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed.dist, "all_gather_object", from_two)
    with pytest.raises(UserError, match="does not beat the blurry input") as caught:
        loop.check_teacher({"input": Scores(26, 0.7), "teacher": Scores(25, 0.6)}, "t.pth", "val", required=True)
    assert caught.value.shared


def test_two_processes_on_a_mac_share_its_cpu_since_gloo_cannot_reach_its_gpu(monkeypatch):
    connected = []
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed, "pick_device", lambda name: torch.device("mps"))
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda backend, **_: connected.append(backend))
    assert distributed.init_distributed("auto") == torch.device("cpu") and connected == ["gloo"]


def test_a_batch_that_cannot_be_shared_is_one_sentence(monkeypatch):
    monkeypatch.setattr(loop, "world_size", lambda: 3)
    with pytest.raises(UserError, match="BATCH_SIZE = 8 cannot be split over 3 processes"):
        loop.load_batches([], torch.device("cpu"), range(2), 8, workers=0)


def test_an_error_before_the_processes_are_connected_is_printed_by_rank_0_alone(monkeypatch):
    def main():
        raise UserError("BATCH_SIZE = 0 is not a whole number")

    printed = []
    for rank in "0", "1":
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as caught:
            run_cli(main)
        printed.append(caught.value.code)
    assert printed == ["error: BATCH_SIZE = 0 is not a whole number", 1]
