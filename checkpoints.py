"""A training that was interrupted goes on exactly where it was."""

import time
from pathlib import Path

import torch

from processes import rank
from utils import UserError, read_torch_file, write_torch_file


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


def drop_finished(path: Path) -> None:
    """Remove the checkpoint of a training that came to its end."""
    if rank() == 0 and path.is_file() and not unfinished(path):
        path.unlink(missing_ok=True)


def load_progress(path: Path, parts: dict, settings: dict) -> dict:
    """Put the states in ``path`` back into ``parts``; returns the progress.

    Raises:
        UserError: if the training was interrupted under other ``settings``, or with another network.
    """
    content = _read(path)
    old = content["settings"]
    changed = [f"{k} was {old.get(k)}, is {settings.get(k)}" for k in old | settings if old.get(k) != settings.get(k)]
    if changed:
        raise UserError(
            f"{path} holds a training that was interrupted under other settings ({'; '.join(changed)}): "
            "set RESUME = False to drop it and start anew, or put the old values back to go on with it"
        )
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


def _read(path: Path) -> dict:
    try:
        content = read_torch_file(path)
        content["states"], content["generators"], content["settings"], content["progress"]["step"], content["finished"]
    except (UserError, TypeError, KeyError, IndexError):
        raise UserError(f"{path} is damaged or no checkpoint: remove it or set RESUME = False to start anew") from None
    return content


def teacher_is_ready(teacher_file: Path, outputs: Path) -> bool:
    """Whether an interrupted run of train.py had taught its own teacher already and was at the student."""
    teacher_run, student_run = outputs / "last_teacher.pth", outputs / "last.pth"
    taught = teacher_file.is_file() and teacher_run.is_file() and not unfinished(teacher_run)
    return taught and (unfinished(student_run) or not student_run.is_file())


def claim(outputs: Path):
    """Keep other trainings out of ``outputs`` until this process ends; the open file that does it, to be held.

    Raises:
        UserError: if another one is at work there.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    if rank() != 0:
        return None
    outputs.mkdir(parents=True, exist_ok=True)
    lock = open(outputs / ".lock", "w")  # noqa: SIM115
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise UserError(f"another training is at work in {outputs}: wait for it, or set OUTPUTS to another folder") from None
    return lock


class Stopwatch:
    """Says when some minutes have passed since it last said so."""

    def __init__(self, minutes: float):
        self.seconds, self.start = minutes * 60, time.monotonic()

    def rings(self) -> bool:
        if time.monotonic() - self.start < self.seconds:
            return False
        self.start = time.monotonic()
        return True
