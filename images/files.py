"""Files that are written whole or not at all, and weights that are read without running any code in them."""

import contextlib

import errno

import glob

import os

import socket

import time

import warnings

import zipfile

from collections.abc import Iterable, Iterator

from pathlib import Path

from typing import IO, BinaryIO

import torch

from utils import UserError

def atomic_write(path: Path | str, write) -> None:
    """Call ``write(partial_path)`` and move its file to ``path``: the old file or the new, never half.

    Raises:
        UserError: if the disk is full or the folder cannot be written; the old file is untouched.
    """
    path = Path(path)
    stem = os.fsencode(path.stem)[:200].decode(errors="ignore")  # bytes; most systems take names of 255
    partial = path.with_name(f".{stem}.{os.getpid()}.partial{path.suffix}")  # Pillow reads the suffix
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_old(path.parent.glob(f".{glob.escape(stem)}.*.partial{path.suffix}"))
        write(partial)
        os.replace(partial, path)
    except OSError as error:
        raise _not_written(path, error) from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)

@contextlib.contextmanager
def growing_file(path: Path) -> Iterator[BinaryIO]:
    """For a ``with``: a file to append to, which becomes ``path`` at its end.

    It starts with what a process of this machine wrote to it that was stopped; two at once write one each.

    Raises:
        UserError: if it cannot be written.
    """
    name = f".{path.name}.{socket.gethostname()}"
    partial = path.with_name(f"{name}.{os.getpid()}.partial")
    try:
        for left in path.parent.glob(f"{glob.escape(name)}.*.partial"):
            if not _is_running(left.name.split(".")[-2]):
                with contextlib.suppress(FileNotFoundError):  # another process has taken it
                    os.replace(left, partial)
        _remove_old(other for other in path.parent.glob(f".*{path.suffix}.*.partial") if other != partial)
        with open(partial, "ab") as file:
            yield file
        os.replace(partial, path)
    except OSError as error:
        raise _not_written(path, error) from None

def _is_running(process: str) -> bool:
    """Whether that process works on this machine; the one that asks does not, it is only starting to."""
    if os.name == "nt" or not process.isdecimal():  # on Windows the question would end it
        return True
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return int(process) != os.getpid()

def _remove_old(files: Iterable[Path]) -> None:
    """Remove what processes that were killed left behind; younger files may be another one's at work."""
    for file in files:
        with contextlib.suppress(OSError):  # another process may have finished with it just now
            if time.time() - file.stat().st_mtime > 86400:  # seconds
                file.unlink(missing_ok=True)

def _not_written(path: Path, error: OSError) -> UserError:
    advice = "free some space" if error.errno in (None, errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "check its folder"
    return UserError(f"{path} cannot be written ({error.strerror or error}): {advice}")

def lock(file: IO) -> bool:
    """Keep other processes from locking the open ``file`` until it is closed; False if one has done so.

    Where there are no locks (Windows, some network drives) it does nothing.
    """
    with contextlib.suppress(ImportError):
        import fcntl

        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            print(f"{file.name} cannot be locked ({error.strerror}): start nothing else that writes there")
    return True

def write_torch_file(path: Path | str, content) -> None:
    """``torch.save(content, path)``, whole or not at all; errors as ``write_whole``."""

    def write(partial: Path) -> None:
        try:
            torch.save(content, partial)
        except RuntimeError:  # which is how torch reports a full disk
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None

    atomic_write(path, write)

def read_torch_file(path: Path | str):
    """The content of a file that ``torch.save`` wrote, on the CPU. No code in it is ever run.

    Raises:
        UserError: if it is missing or damaged.
        PermissionError: if it may not be read.
    """
    if not Path(path).is_file():
        raise UserError(f"{path} is not a file: give the path of a .pth file")
    try:
        with warnings.catch_warnings(), zipfile.ZipFile(path) as parts:
            if parts.testzip():  # torch does not look at the check sums
                raise ValueError
            warnings.simplefilter("ignore")  # torch warns of old kinds of files before it refuses them
            return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception:  # the unpickler fed damaged bytes may raise anything
        raise UserError(f"{path} cannot be read as weights: it is damaged, or not a file of save_model") from None
