"""Command-line behaviour shared by the scripts: errors in one sentence, Ctrl-C, arguments."""

import argparse
import errno
import logging
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from utils import UserError, one_line


def run_cli(main: Callable[[], None]) -> None:
    """Call ``main()``; a ``UserError`` becomes one sentence on stderr and exit code 1. SIGTERM acts like Ctrl-C.

    A process of torchrun ends here, without Python's own shutdown: gloo's threads abort some processes in it.
    """
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115  stderr may be closed
    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # problems with an image are reported by our own errors
    warnings.filterwarnings("ignore", module=r"PIL\.")
    if "RANK" not in os.environ:  # torchrun sends SIGTERM to ranks that wait in a collective, where Python cannot react
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    streams = [stream for stream in (sys.stdout, sys.stderr) if hasattr(stream, "reconfigure")]
    for stream in streams:  # file names may contain what the terminal cannot show
        stream.reconfigure(errors="backslashreplace")
    try:
        main()
        for stream in streams:
            stream.flush()
        end = 0
    except SystemExit as stop:
        end = stop.code
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "interrupted", file=sys.stderr)
        end = 130  # the shell's code for Ctrl-C
    except Exception as error:
        end = _sentence(error)
        if end is None:
            if not dist.is_initialized():
                raise
            traceback.print_exc()
            end = 1
    if dist.is_initialized():
        if isinstance(end, str):
            print(end, file=sys.stderr)
            end = 1
        if not end:
            dist.barrier()  # rank 0 may still be writing; torchrun ends all when one has ended with an error
        for stream in streams:
            stream.flush()
        os._exit(end or 0)
    if end:
        sys.exit(end)


def _sentence(error: Exception) -> str | int | None:
    """What to tell the user about ``error``: None if it is a bug, exit code 1 if another rank tells it."""
    if isinstance(error, UserError):
        text = str(error).rsplit("UserError: ", 1)[-1].strip()  # from a worker it comes after a traceback
        text = text if "\n  " in text else one_line(text)  # a list of problems keeps its lines
        # Before the ranks are connected they all check the same constants, so all of them fail alike
        shared = error.shared or not dist.is_initialized()
        return 1 if shared and os.environ.get("RANK", "0") != "0" else f"error: {text}"
    if is_out_of_memory(error):
        return "error: out of memory: lower BATCH_SIZE, PATCH_SIZE or NUM_WORKERS, or use smaller photos; then run again"
    if not isinstance(error, OSError):
        return None
    if (error.errno or 0) <= 0:  # not from the disk: a download without a connection, for example
        return f"error: {one_line(str(error)) or type(error).__name__}: if it was a download, connect and run again"
    reason = f"failed ({error.strerror}): check disk space and permissions"
    if error.errno == errno.EPIPE:
        reason = "is no longer read: the program after it has ended"
    if not error.filename:  # stdout itself: closed by its reader, or on a full disk
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again at exit
    return f"error: {error.filename or 'the output'} {reason}"


def is_out_of_memory(error: BaseException | None) -> bool:
    # The second sentence is the end of a worker process, which Linux kills for lack of memory, and so is ECONNRESET
    said = any(sentence in str(error) for sentence in ("allocate memory", "DataLoader worker (pid"))
    errors = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return said or errors or getattr(error, "errno", None) in (errno.ENOMEM, errno.ECONNRESET)


class CliParser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence."""

    def __init__(self, documentation: str | None = None, **options):
        super().__init__(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> None:
        raise UserError(f"{message} (see python {self.prog} --help)")


def whole_number(minimum: int, maximum: int = 2**31) -> Callable[[str], int]:
    """For ``add_argument(type=...)``: a whole number in that range."""

    def parse(text: str) -> int:
        if not text.removeprefix("-").isdecimal() or not minimum <= int(text) <= maximum:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number from {minimum} to {maximum}")
        return int(text)

    return parse


def image_size(text: str) -> tuple[int, int]:
    """For ``add_argument(type=...)``: WIDTHxHEIGHT -> (height, width)."""
    if not re.fullmatch(r"[1-9]\d{0,3}x[1-9]\d{0,3}", text):  # more pixels would hardly fit in memory
        raise argparse.ArgumentTypeError(f"{text} must be WIDTHxHEIGHT, such as 1280x720, below 10000 each")
    width, height = map(int, text.split("x"))
    return height, width


def check_writable(folder: Path, name: str) -> None:
    """Raise ``UserError`` if ``folder``, given as ``name``, cannot be created or written to; creates nothing."""
    existing = next(filter(os.path.lexists, (folder, *folder.parents)), folder)  # on Windows a whole drive may be missing
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"{name}: {existing} is not a folder that can be written to, choose another place")
