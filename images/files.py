"""Files that are written whole or not at all, and weights that are read without executing any code in them."""

import contextlib
import errno
import os
import shutil
import tempfile
import time
import warnings
import zipfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import torch

from utils import UserError

PARTIAL_PREFIX = ".sharpening-"  # of the folders in which files are written: those of other programs are left alone


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Context manager: where to write what becomes the file or folder ``path`` at the end, whole or not at all.

    An ``OSError`` in the block, such as a full disk, becomes a ``UserError``.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path.parent)
        hidden = dict(prefix=PARTIAL_PREFIX, suffix=".partial", ignore_cleanup_errors=True)
        with tempfile.TemporaryDirectory(dir=path.parent, **hidden) as folder:
            yield Path(folder, path.name)
            os.replace(Path(folder, path.name), path)
    except OSError as error:
        raise _write_error(path, error) from None


@lru_cache  # once per folder and process: listing a large folder at each write would take quadratic time
def _remove_stale(folder: Path) -> None:
    """Remove what killed processes left behind a day ago or earlier; younger folders may belong to a running one."""
    for partial in folder.glob(f"{PARTIAL_PREFIX}*.partial"):
        with contextlib.suppress(OSError):  # another process may have been faster
            newest = max(path.stat().st_mtime for path in (partial, *partial.iterdir()))
            if time.time() - newest > 86400:  # seconds
                shutil.rmtree(partial)


@contextlib.contextmanager
def resumable_file(path: Path) -> Iterator[BinaryIO]:
    """Context manager: a file to append to, with what an interrupted process wrote to it; becomes ``path`` at the end.

    The caller makes sure that no other process does the same (``training.run.lock_path``). Errors as in ``atomic``.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "ab") as file:
            yield file
        os.replace(partial, path)
    except OSError as error:
        raise _write_error(path, error) from None


def _write_error(path: Path, error: OSError) -> UserError:
    disk_full = error.errno in (None, errno.ENOSPC, getattr(errno, "EDQUOT", None), errno.EFBIG)
    advice = "free some disk space" if disk_full else "check its folder"
    return UserError(f"{path} cannot be written ({error.strerror or error}): {advice}")


def write_torch_file(path: Path | str, content) -> None:
    """``torch.save(content, path)``, whole or not at all; errors as in ``atomic``."""
    with atomic(Path(path)) as partial:
        try:
            torch.save(content, partial)
        except RuntimeError:  # torch's way to report a full disk
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None


def read_torch_file(path: Path | str):
    """What ``torch.save`` wrote to ``path``, on the CPU, or a ``UserError``. No code in the file is ever executed."""
    if not Path(path).is_file():
        raise UserError(f"{path} is not a file: give the path of a .pth file")
    try:
        with warnings.catch_warnings(), zipfile.ZipFile(path) as archive:
            if archive.testzip():  # torch does not verify checksums
                raise ValueError
            warnings.simplefilter("ignore")  # torch warns about old formats before it refuses them
            return torch.load(path, map_location="cpu", weights_only=True)
    except (PermissionError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:  # damaged bytes may raise anything in the unpickler
        raise UserError(f"{path} is damaged or was not written by these scripts: replace or remove it") from None
