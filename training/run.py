"""A training that was interrupted goes on exactly where it was, and what is kept for it belongs to it."""

import contextlib

import hashlib

import inspect

import time

from pathlib import Path

from typing import IO

import torch

from torch import nn

import estimator

import layers

from degradations import convolve, reflect_indices

from files import lock, read_torch_file, write_torch_file

from processes import rank

from utils import UserError

def save_progress(path: Path, parts: dict, settings: dict, progress: dict) -> None:
    """Write all that the rest of a training depends on to ``path``, the old file or the new, never half.

    Args:
        parts: name -> network, optimizer or whatever else has a ``state_dict``.
        settings: what must be the same when it goes on; plain values.
        progress: where it is; plain values, among them "step".
    """
    generators = {"cpu": torch.get_rng_state()}  # a network with dropout draws from these
    if torch.cuda.is_initialized():
        generators["cuda"] = torch.cuda.get_rng_state()
    states = {name: part.state_dict() for name, part in parts.items()}
    content = {"states": states, "generators": generators, "settings": settings, "progress": progress, "finished": False}
    write_torch_file(path, content)

def mark_finished(path: Path) -> None:
    """The next run starts anew instead of going on from ``path``."""
    if rank() == 0:
        write_torch_file(path, _read(path) | {"finished": True})

def unfinished(path: Path) -> bool:
    """Whether ``path`` is the checkpoint of a training that was interrupted."""
    return path.is_file() and not _read(path)["finished"]

def make_way(outputs: Path, resume: bool, settings: dict) -> None:
    """Before a teacher is taught: remove what an earlier teacher and its student left in ``outputs``.

    Raises:
        UserError: with ``resume``, if the student's training was interrupted, or the teacher's under other ``settings``.
    """
    teacher_run, student_run = outputs / "last_teacher.pth", outputs / "last.pth"
    if resume and unfinished(student_run):
        raise UserError(
            f"{student_run} holds a training that was interrupted, of a student of another teacher: set RESUME = False to "
            "drop it and start anew, or put TEACHER_WEIGHTS back to go on with it"
        )
    goes_on = resume and unfinished(teacher_run)
    if goes_on:
        check_settings(teacher_run, settings)
    if rank() == 0:
        student_run.unlink(missing_ok=True)
        if not goes_on:
            teacher_run.unlink(missing_ok=True)

def load_progress(path: Path, parts: dict, settings: dict) -> dict:
    """Put the states in ``path`` back into ``parts``; returns the progress.

    Raises:
        UserError: if the training was interrupted under other ``settings``, or with another network.
    """
    content = _read(path)
    _compare(path, content["settings"], dict.fromkeys(content["settings"]) | settings)  # one that is gone has changed too
    try:
        for name, part in parts.items():
            part.load_state_dict(content["states"][name])
    except (RuntimeError, ValueError, KeyError):
        raise UserError(
            f"{path} holds a training of a network that was written differently then: set RESUME = False to drop it "
            "and start anew, or put the old network back to go on with it"
        ) from None
    torch.set_rng_state(content["generators"]["cpu"])
    if "cuda" in content["generators"] and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(content["generators"]["cuda"])
    return content["progress"]

def check_settings(path: Path, settings: dict) -> None:
    """Raise ``UserError`` if the training in the checkpoint ``path`` had other values for these ``settings``."""
    _compare(path, _read(path)["settings"], settings)

def _compare(path: Path, old: dict, settings: dict) -> None:
    changed = [f"{name} was {old.get(name)}, is {value}" for name, value in settings.items() if old.get(name) != value]
    if changed:
        raise UserError(
            f"{path} holds a training under other settings ({'; '.join(changed)}): "
            "set RESUME = False to drop it and start anew, or put the old values back to go on with it"
        )

def _read(path: Path) -> dict:
    try:
        content = read_torch_file(path)
        content["states"], content["generators"], content["settings"], content["progress"]["step"], content["finished"]
    except (UserError, TypeError, KeyError, IndexError):
        raise UserError(f"{path} is damaged or no checkpoint: remove it or set RESUME = False to start anew") from None
    return content

def teacher_is_ready(teacher_file: Path, outputs: Path, settings: dict) -> bool:
    """Whether an interrupted run of train.py had taught its own teacher already and was at the student.

    Raises:
        UserError: if that was under other ``settings``, or the teacher there is one of pretrain.py.
    """
    teacher_run, student_run = outputs / "last_teacher.pth", outputs / "last.pth"
    taught = teacher_file.is_file() and teacher_run.is_file() and not unfinished(teacher_run)
    old = _read(teacher_run)["settings"] if taught else {}
    if "START_FROM" in old:
        raise UserError(
            f"{teacher_file} was taught by pretrain.py, and another teacher would take its place: name it in "
            "TEACHER_WEIGHTS, or set RESUME = False"
        )
    if not taught or (student_run.is_file() and not unfinished(student_run)):
        return False
    _compare(teacher_run, old, settings)
    return True

def lock_output_dir(outputs: Path) -> IO | None:
    """Keep other trainings out of ``outputs`` until this process ends; the open file that does it, to be held.

    Raises:
        UserError: if another one is at work there.
    """
    if rank() != 0:
        return None
    outputs.mkdir(parents=True, exist_ok=True)
    file = open(outputs / ".lock", "w")  # noqa: SIM115
    if not lock(file):
        file.close()
        raise UserError(
            f"another training is at work in {outputs}: wait for it, or set OUTPUTS to another folder, "
            "and BEST_STUDENT or TEACHER to another file"
        )
    return file

def fingerprint(network: nn.Module) -> str:
    """20 characters that change with any weight of ``network``, with its shape, and with the code that runs it."""
    digest = hashlib.sha256(type(network).__name__.encode())
    kinds = {type(part) for part in network.modules() if not type(part).__module__.startswith("torch.")}
    for code in [*sorted(kinds, key=lambda kind: kind.__qualname__), estimator, layers, convolve, reflect_indices]:
        with contextlib.suppress(OSError, TypeError):  # a class typed at a prompt has no source
            digest.update(inspect.getsource(code).encode())
    for name, value in network.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:20]

class Stopwatch:
    """Says when some minutes have passed since it last said so."""

    def __init__(self, minutes: float):
        self.seconds, self.start = minutes * 60, time.monotonic()

    def rings(self) -> bool:
        if time.monotonic() - self.start < self.seconds:
            return False
        self.start = time.monotonic()
        return True
