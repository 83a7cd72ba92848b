"""Faults of the machine and signals: one sentence, or an end that leaves nothing half done."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from checkpoints import claim, unfinished
from dataset import PairedImageDataset, without_traceback
from utils import UserError, run_script

ROOT = Path(__file__).parent.parent


def test_two_trainings_do_not_share_a_folder(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path; from checkpoints import claim\n"
    code += f"lock = claim(Path({str(tmp_path)!r})); print('held', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another training is at work in"):
            claim(tmp_path)
        other.communicate("")
    claim(tmp_path).close()


def test_a_training_that_is_stopped_leaves_no_half_file(pairs, tmp_path):
    settings = "NUM_EPOCHS=10**6, PATCH_SIZE=32, PATCHES_PER_PHOTO=4, BATCH_SIZE=4, TEACHER_WEIGHTS=None, DEVICE='cpu'"
    script = f"""
import signal, sys; sys.path.insert(0, {str(ROOT)!r})
import torch, train, utils, models
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests run in the background it is ignored
vars(train).update(dict({settings}))
train.TeacherCNN = lambda: models.TeacherCNN(4, 8, 1, 1)
train.teach_gauge = lambda *_, **__: None
utils.run_script(train.main)
"""
    trainings = {}
    for number in signal.SIGTERM, signal.SIGINT:  # side by side, which saves time; for SIGKILL see kill_and_resume.py
        folder = tmp_path / number.name
        shutil.copytree(pairs, folder / "data")
        command = [sys.executable, "-c", script]
        trainings[number] = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for number, training in trainings.items():
        with training:
            while "teacher 2/" not in (line := training.stdout.readline()):
                assert line, training.stderr.read()
            time.sleep(0.1)
            training.send_signal(number)
            _, errors = training.communicate(timeout=30)
        assert training.returncode == 130 and "Traceback" not in errors
        assert not list((tmp_path / number.name).rglob("*partial*"))
        torch.load(tmp_path / number.name / "outputs" / "last_teacher.pth", weights_only=True)


def test_a_data_worker_that_dies_is_one_sentence(pairs):
    batches = without_traceback(iter(torch.utils.data.DataLoader(Dies(), batch_size=None, num_workers=1)))
    with pytest.raises(UserError, match=r"a process that cuts patches has ended.*run again to go on, with NUM_WORKERS = 0"):
        list(batches)


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
    claim(tmp_path).close()
    assert ".lock cannot be locked (No locks available): start nothing else that writes there" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error, sentence",
    [
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "there is not enough memory"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            "there is not enough memory",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "outputs/last.pth"),
            "outputs/last.pth failed (Permission denied)",
        ),
    ],
)
def test_a_fault_of_the_machine_is_one_sentence(error, sentence):
    def main():
        raise error

    with pytest.raises(SystemExit) as caught:
        run_script(main)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    def forbidden(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    (tmp_path / "last.pth").touch()
    monkeypatch.setattr("files.zipfile.ZipFile", forbidden)  # root may read everything
    with pytest.raises(PermissionError):
        unfinished(tmp_path / "last.pth")
