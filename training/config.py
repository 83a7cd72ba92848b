"""The constants of a training, checked in one place, and checks of networks and files before the work starts."""

import copy
import importlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import nn

import models
from cli import check_writable
from inference import blur_of
from training.distributed import world_size
from utils import UserError, make_generator, one_line


@dataclass(frozen=True)
class TrainConfig:
    """The constants of train.py and pretrain.py that are numbers or switches; ``UserError`` if one is not in its range."""

    num_epochs: int
    patches_per_photo: int
    batch_size: int
    patch_size: int
    learning_rate: float
    seed: int
    distill_weight: float = 0.0
    freeze_estimator: bool = True
    cache_teacher: bool = True
    teacher_orientations: int = 1
    estimator_versions: int = 1
    estimator_passes: int = 1
    estimator_learning_rate: float = 4e-3
    # These may change when a training is resumed
    num_workers: int = 0
    tensorboard: bool = False
    resume: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            name, value = field.name.upper(), getattr(self, field.name)
            if field.type is bool:
                valid, wanted = type(value) is bool, "True or False"
            elif field.type is int:
                low = 0 if field.name in ("seed", "num_workers") else 1
                high = 8 if field.name == "teacher_orientations" else 2**31 - 1
                valid, wanted = type(value) is int and low <= value <= high, f"a whole number from {low} to {high}"
            elif field.name == "distill_weight":
                valid, wanted = type(value) in (int, float) and 0 <= value <= 1, "a number from 0 to 1"
            else:
                valid, wanted = type(value) in (int, float) and 0 < value < 1e9, "a number above 0"
            if not valid:
                raise UserError(f"{name} = {value!r} is not {wanted}: set it to one")
        if self.tensorboard:
            try:
                importlib.import_module("torch.utils.tensorboard")
            except ImportError:
                raise UserError("TENSORBOARD = True needs a package: pip install tensorboard") from None

    def identity(self) -> dict:
        """The constants that must be the same when a training is resumed."""
        free = ("num_workers", "tensorboard", "resume")
        return {name.upper(): value for name, value in asdict(self).items() if name not in free}


def check_paths(outputs: str | Path, name: str, file: str | Path, read: dict[str, str | Path]) -> None:
    """Raise ``UserError`` if a file cannot be written, or would overwrite one that is read or is the training's own.

    ``outputs`` is the constant OUTPUTS, ``file``, for weights, that called ``name``; ``read`` are others by their names.
    """
    for constant, value in {"OUTPUTS": outputs, name: file, **read}.items():
        if not isinstance(value, (str, Path)) or not str(value):
            raise UserError(f"{constant} = {value!r} is not a path: set it to one in quotes")
        if str(value).startswith("~"):
            raise UserError(f"{constant} = {str(value)!r} starts with ~, which only a shell replaces: write the whole path")
    check_writable(Path(outputs), "OUTPUTS")
    if Path(file).suffix != ".pth" or Path(file).is_dir():
        raise UserError(f"{name} = {str(file)!r} cannot be a file for weights: choose a name that ends in .pth")
    own = [f"{kind}_{state}.pth" for kind in ("student", "teacher") for state in ("checkpoint", "last")]
    if os.path.realpath(file) in [os.path.realpath(Path(outputs, each)) for each in ("estimator.pth", *own)]:
        raise UserError(f"{name} = {str(file)!r} is a file that the training itself writes: choose another name")
    if same := [other for other, source in read.items() if os.path.realpath(source) == os.path.realpath(file)]:
        raise UserError(f"{name} and {same[0]} are both {file}, which would be overwritten: choose another file")
    check_writable(Path(file).parent, name)


def check_network(network: nn.Module) -> None:
    """Raise ``UserError`` if ``network`` changes the size of a photo, cannot be trained, or could not be loaded again."""
    name, photo = type(network).__name__, torch.zeros(1, 3, 61, 67)
    if getattr(models, name, None) is not type(network):
        raise UserError(f"{name} is not a class in models.py, where load_model looks for it: move it there")
    try:
        again = type(network)(**json.loads(json.dumps(getattr(network, "arguments", {}))))  # as load_model does
        again = copy.deepcopy(again).eval()  # as TrainingRun does for the averaged weights
        result = again(photo, *blur_of(again, photo))
    except Exception as error:  # anything may be wrong with a user's own network
        raise UserError(
            f"{name}, built again with self.arguments, fails on a photo of shape {tuple(photo.shape)} "
            f"({one_line(str(error))[:300]}): fix forward(), or the arguments, which must be plain values"
        ) from None
    shape = tuple(result.shape) if isinstance(result, torch.Tensor) else type(result).__name__
    if shape != tuple(photo.shape):
        raise UserError(f"{name} turns a photo of shape {tuple(photo.shape)} into {shape}: return one of the same shape")
    if not torch.isfinite(result).all():
        raise UserError(f"{name} turns a black photo into values that are not finite: avoid a division by zero or log(0)")
    if any(map(nn.parameter.is_lazy, network.parameters())):
        raise UserError(f"{name} has parameters without a shape: give its layers their numbers of channels")
    if not any(value.requires_grad for value in network.parameters()):
        raise UserError(f"{name} has no parameter that requires a gradient: give it one, or nothing is trained")
    if types := {value.dtype for value in network.parameters()} - {torch.float32}:
        raise UserError(f"{name} has weights of {types.pop()}: keep them in torch.float32, the scripts use autocast")
    if world_size() > 1:
        result.sum().backward()
        if unused := [part for part, value in again.named_parameters() if value.requires_grad and value.grad is None]:
            raise UserError(f"{name} does not use {', '.join(unused[:5])}, which torchrun does not allow: remove it")


def check_loss(loss_fn: nn.Module | Callable, device: torch.device, patch_size: int, with_input_mse: bool = False) -> None:
    """Move ``loss_fn`` to ``device`` and call it once; raise ``UserError`` if it cannot be minimized there."""
    name = getattr(loss_fn, "__qualname__", type(loss_fn).__qualname__)
    size = min(patch_size, 256)  # some losses need a few windows of 11 pixels, none needs more
    patches = torch.rand(4, 3, size, size, generator=make_generator(0))
    patches[:2].mul_(1.2).sub_(0.1)  # predictions may be a little outside [0, 1]
    patches = patches.to(device, memory_format=torch.channels_last).chunk(2)  # in training, too
    arguments = [patches[0].requires_grad_(), patches[1]] + [torch.full((2,), 1e-3, device=device)] * with_input_mse
    if isinstance(loss_fn, nn.Module):
        loss_fn.to(device)
        if any(value.requires_grad for value in loss_fn.parameters()):
            raise UserError(f"{name} has parameters of its own, which are not trained: call its requires_grad_(False)")
    try:
        loss = loss_fn(*arguments)
        loss.backward()
        if not torch.isfinite(loss).all():
            raise ValueError(f"it is {loss.item()}")
        if patches[0].grad is None or not patches[0].grad.any():
            raise ValueError("it has no gradient")
    except Exception as error:  # anything may be wrong with a user's own loss
        raise UserError(
            f"{name} cannot be minimized on patches of shape {tuple(patches[0].shape)} ({one_line(str(error))[:300]}): "
            "return one finite number that depends on the prediction, as a tensor"
        ) from None
