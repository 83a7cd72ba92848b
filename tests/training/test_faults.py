"""Faults of the machine and signals: one sentence, or an end that leaves nothing half done."""

import errno
import fcntl
import os
import shutil
import signal
import socket
import urllib.error

import pytest
import torch
from conftest import hold_locks, small_teacher, wait_for

import train
from cli import run_cli
from dataset import PairedImageDataset
from images.files import read_torch_file
from models import save_model
from training import loop
from training.loop import load_batches
from training.run import lock_path
from utils import UserError


def test_two_trainings_share_neither_a_folder_nor_a_file_for_weights(tmp_path, start):
    other = start(hold_locks, tmp_path, log=tmp_path / "log")
    wait_for("held", other, tmp_path / "log")
    with pytest.raises(UserError, match=f"another training is writing to {tmp_path}: wait for it, or choose another place"):
        lock_path(tmp_path)
    with pytest.raises(UserError, match="another training is writing to .*best.pth: wait for it"):
        lock_path(tmp_path / "best.pth")
    lock_path(tmp_path / "other.pth").close()
    other.kill()
    other.join()
    lock_path(tmp_path).close()
    lock_path(tmp_path / "best.pth").close()


def endless_training(folder):
    os.chdir(folder)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests run in the background it is ignored
    settings = dict(
        NUM_EPOCHS=10**6, PATCH_SIZE=32, PATCHES_PER_PHOTO=4, BATCH_SIZE=4, DEVICE="cpu", REQUIRE_GOOD_TEACHER=False
    )
    vars(train).update(settings)
    train.TEACHER_WEIGHTS = "teacher.pth"
    save_model("teacher.pth", small_teacher())
    run_cli(train.main)


def test_a_training_that_is_stopped_leaves_no_half_file(pairs, tmp_path, start):
    trainings = {}
    for number in signal.SIGTERM, signal.SIGINT:  # side by side, which saves time; for SIGKILL see kill_and_resume.py
        folder = tmp_path / number.name
        shutil.copytree(pairs, folder / "data")
        trainings[number] = start(endless_training, folder, log=folder / "log")
    for number, training in trainings.items():
        log = tmp_path / number.name / "log"
        wait_for("student 2/", training, log)
        os.kill(training.pid, number)
        training.join(30)
        assert training.exitcode == 130 and "Traceback" not in log.read_text()
        assert not list((tmp_path / number.name).rglob("*partial*"))
        torch.load(tmp_path / number.name / "outputs" / "student_checkpoint.pth", weights_only=True)


def test_a_data_worker_that_dies_is_one_sentence():
    batches = torch.utils.data.DataLoader(Dies(), batch_size=None, num_workers=1)
    with pytest.raises(SystemExit, match=r"out of memory: lower .*NUM_WORKERS.*run again"):
        run_cli(lambda: list(batches))


class Full(torch.utils.data.Dataset):
    """A training set in whose workers there is no shared memory left, as with Docker's 64 MB."""

    def __getitem__(self, _):
        part = torch.zeros(1)
        part.share_memory_ = self.share
        return [part]

    def share(self):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")


def test_full_shared_memory_is_one_sentence_and_no_wait_for_ever(monkeypatch):
    # As in a worker, but in this process: torch waits for 5 seconds when a worker has raised an error
    monkeypatch.setattr(loop, "get_worker_info", lambda: "worker 0")
    with pytest.raises(SystemExit) as caught:
        run_cli(lambda: list(load_batches(Full(), torch.device("cpu"), range(1), 1, workers=0)))
    assert "is out of shared memory (unable to allocate" in str(caught.value) and "\n" not in str(caught.value)
    assert "NUM_WORKERS = 0" in str(caught.value)


class Dies(torch.utils.data.Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, _):
        os.kill(os.getpid(), signal.SIGKILL)


def test_photos_are_decoded_into_a_temporary_folder_where_the_data_cannot_be_written(pairs):
    (pairs / "train" / ".cache").write_text("in the way")
    train_set = PairedImageDataset(pairs / "train", 32)
    assert train_set[0][0].shape == (3, 32, 32)


def test_a_folder_without_locks_is_used_all_the_same(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    lock_path(tmp_path).close()
    assert ".lock cannot be locked (No locks available): start nothing else that writes there" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error, sentence",
    [
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            "out of memory",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "outputs/best.pth"),
            "outputs/best.pth failed (Permission denied)",
        ),
        (urllib.error.URLError("Name or service not known"), "Name or service not known>: if it was a download, connect"),
        (urllib.error.HTTPError("https://a.b/c.pth", 404, "Not Found", None, None), "HTTP Error 404: Not Found: if it was"),
        (TimeoutError("timed out"), "error: timed out: if it was a download"),
        (socket.gaierror(-2, "Name or service not known"), "Name or service not known: if it was a download"),
    ],
)
def test_a_fault_of_the_machine_is_one_sentence(error, sentence):
    def main():
        raise error

    with pytest.raises(SystemExit) as caught:
        run_cli(main)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    def forbidden(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    (tmp_path / "last.pth").touch()
    monkeypatch.setattr("images.files.zipfile.ZipFile", forbidden)  # root may read everything
    with pytest.raises(PermissionError):
        read_torch_file(tmp_path / "last.pth")
