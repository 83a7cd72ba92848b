"""A user's mistakes with constants, files and arguments, each told in one sentence before the work starts."""

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

FLAGS = {"COMPILE", "RESUME", "ASK_TEACHER_ONCE", "REQUIRE_GOOD_TEACHER"}

PATHS = {"DATA", "BEST_STUDENT", "OUTPUTS", "TEACHER"}

PATHS_OR_NONE = {"TEACHER_WEIGHTS", "PHOTOS", "VAL_PHOTOS", "START_FROM"}

RATES = {"LEARNING_RATE", "TEACHER_LEARNING_RATE", "GAUGE_LEARNING_RATE", "CHECKPOINT_MINUTES"}

OF_TRAININGS = {"last.pth", "last_teacher.pth", "gauge.pth"}  # what a training keeps in OUTPUTS for itself

def check_constants(constants: dict) -> None:
    """Raise ``UserError`` for a constant of a training that is out of its range or of another type."""
    for name, value in constants.items():
        number, least = type(value) in (int, float), 0 if name in ("SEED", "NUM_WORKERS") else 1
        if name in FLAGS:
            if type(value) is not bool:
                raise UserError(f"{name} = {value!r} is not True or False: set it to one of them")
        elif name in PATHS | PATHS_OR_NONE:
            if not (value is None and name in PATHS_OR_NONE):
                check_path(name, value)
        elif name in RATES:
            if not (number and 0 < value < 1e9):
                raise UserError(f"{name} = {value!r} is not a number above 0: set it to one")
        elif name == "DISTILL_WEIGHT":
            if not (number and 0 <= value <= 1):
                raise UserError(f"{name} = {value!r} is not a number from 0 to 1: set it to one")
        else:
            most = 2**62 if name == "SEED" else 2**31
            if type(value) is not int or not least <= value <= most:
                raise UserError(f"{name} = {value!r} is not a whole number from {least} to {most}: set it to one")

def check_path(name: str, value) -> None:
    if not isinstance(value, (str, Path)) or not str(value):
        none = ", or None" if name in PATHS_OR_NONE else ""
        raise UserError(f"{name} = {value!r} is not a path: set it to one in quotes{none}")
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            os.stat(value)
    except (OSError, ValueError) as error:  # too long, or with a zero byte
        raise UserError(f"{name} = {str(value)[:80]!r} cannot be a path ({error.args[-1]}): set it to another") from None

def check_targets(outputs: str | Path, networks: dict[str, str], given: dict[str, str | None]) -> None:
    """Raise ``UserError`` if what a training will write cannot be written, or would overwrite what it was given.

    Args:
        networks: name of the constant -> file for weights.
        given: name of the constant -> file that is only read.
    """
    check_folder(Path(outputs), "OUTPUTS")
    for name, file in networks.items():
        path = Path(file)
        if path.suffix != ".pth" or path.is_dir() or path.name in OF_TRAININGS:
            raise UserError(f"{name} = {file!r} cannot be a file for weights: name one that ends in .pth, such as best.pth")
        for other, file_given in given.items():
            if file_given is not None and os.path.realpath(file_given) == os.path.realpath(path):
                raise UserError(f"{name} and {other} are both {file}: it would be overwritten, name another file")
        check_folder(path.parent, name)

def check_network(network: nn.Module) -> None:
    """Raise ``UserError`` if ``network`` does not give a photo of the size it got, or could not be loaded again."""
    name, photo = type(network).__name__, torch.zeros(1, 3, 61, 67)
    if getattr(models, name, None) is not type(network):
        raise UserError(f"{name} is not a class in models.py, where load_model looks for it: move it there")
    try:
        type(network)(**getattr(network, "arguments", {}))
    except TypeError as error:
        raise UserError(f"{name} cannot be made again ({error}): keep what its constructor got in self.arguments") from None
    try:
        result = network.eval()(photo)
    except Exception as error:  # whatever may be wrong with a network of one's own
        reason = one_line(str(error))[:300]
        raise UserError(f"{name} fails with a photo of {tuple(photo.shape)} ({reason}): mend it") from None
    if not isinstance(result, torch.Tensor):
        raise UserError(f"{name} gives a {type(result).__name__}, not a photo: return one tensor")
    if result.shape != photo.shape:
        raise UserError(f"{name} makes {tuple(result.shape)} of a photo of {tuple(photo.shape)}: pad the photo in it")
    if world_size() > 1:
        result.sum().backward()
        unused = [part for part, value in network.named_parameters() if value.requires_grad and value.grad is None]
        if unused:
            raise UserError(f"{name} does not use {', '.join(unused[:5])}, which torchrun does not allow: remove it")
        network.zero_grad()

def check_memory(bytes_each: int, workers: int) -> None:
    """Raise ``UserError`` if photos blurred on the fly, kept by each of the ``workers``, take more memory than there is."""
    try:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows, for one
        return
    needed = bytes_each * max(1, workers) * int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of torchrun
    if needed > there:
        raise UserError(
            f"the blurred photos of PHOTOS take {needed / 1e9:.0f} GB of memory, and this machine has {there / 1e9:.0f}: "
            "lower NUM_WORKERS, take fewer photos, or make pairs of them with prepare_data.py"
        )

def check_compiler(wanted: bool, device: torch.device) -> None:
    """Raise ``UserError`` if a network shall be compiled for ``device`` and torch cannot."""
    if not wanted:
        return
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.zeros(8, device=device))
    except Exception as error:  # of many kinds, with pages of advice
        reason = one_line(str(error).strip())[:120]
        raise UserError(f"COMPILE = True does not work here ({reason}): install a C++ compiler or set it to False") from None
