"""What the scripts share with a terminal."""

import argparse

import contextlib

import os

import re

import tempfile

from collections.abc import Callable

from pathlib import Path

import torch

from torch import nn

import models

from processes import world_size

from utils import UserError, one_line

import errno

import logging

import os

import signal

import sys

import time

import warnings

from typing import NamedTuple

import numpy as np

import torch

import torch.wrap_distributed as dist

import torch.nn.functional as F

from torch import Tensor

from torch.utils.flop_counter import FlopCounterMode

OUT_OF_MEMORY = (
    "error: there is not enough memory: lower BATCH_SIZE, PATCH_SIZE or NUM_WORKERS, take smaller photos, or close programs"
)

def run_cli(main) -> None:
    """Call ``main()``; a ``UserError`` becomes its sentence on stderr and exit code 1. SIGTERM ends it as Ctrl-C does."""
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115  where it is closed, bars and sentences go nowhere
    # What is wrong with a picture is told in a sentence
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module=r"PIL\.")
    if "RANK" not in os.environ:  # torchrun ends processes by it that wait for others, where Python is not asked
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a file's name may hold what the terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
        if hasattr(sys.stdout, "flush"):
            sys.stdout.flush()
    except UserError as error:
        text = str(error)
        if "Original Traceback" in text:  # a worker's error: the loader puts its whole traceback before the sentence
            text = text.rsplit("UserError: ", 1)[-1].strip()
        text = text if "\n  " in text else one_line(text)  # but for the list of all that is wrong with a folder
        sys.exit(1 if error.shared and os.environ.get("RANK", "0") != "0" else f"error: {text}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)  # the shell's code for Ctrl-C
    except OSError as error:
        if error.errno == errno.ENOMEM:
            sys.exit(OUT_OF_MEMORY)
        # Else of what is printed above all: nobody reads it, or its disk is full
        if not error.filename:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # python would complain once more at its end
        sys.exit(
            f"error: {error.filename or 'the output'} failed ({error.strerror}): free some space or check who may use it"
        )
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        sys.exit(OUT_OF_MEMORY)
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()

def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)

class CliParser(argparse.ArgumentParser):
    """A parser whose errors are one sentence, as all others."""

    def __init__(self, documentation: str):
        super().__init__(spectrum=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> None:
        raise UserError(f"{message} (python {self.prog} --help tells what it takes)")

def whole_number(least: int, most: int = 2**31) -> Callable[[str], int]:
    """For ``add_argument(type=...)``."""

    def parse(text: str) -> int:
        if not text.removeprefix("-").isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number from {least} to {most}")
        return int(text)

    return parse

def size_of(name: str, text: str) -> tuple[int, int]:
    """(height, width) of "WIDTHxHEIGHT", which was given as ``name``."""
    if not re.fullmatch(r"[1-9]\d{0,4}x[1-9]\d{0,4}", text):
        raise UserError(f"{name} {text} must be WIDTHxHEIGHT, such as 1280x720")
    width, height = map(int, text.split("x"))
    if width * height > 10**8:
        raise UserError(f"{name} {text} is more than 100 megapixels: take less, or sharpen such pictures as files")
    return height, width

def check_folder(folder: Path, name: str) -> None:
    """Raise ``UserError`` if ``folder`` cannot be made or written to; makes nothing."""
    there = folder
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        reason = "is not a folder" if not there.is_dir() else f"cannot be written to ({error.strerror})"
        raise UserError(f"{name}: {there} {reason}, choose another place") from None
