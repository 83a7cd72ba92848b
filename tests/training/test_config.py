"""Networks and losses of one's own that cannot be used, each with its one sentence before the work."""

import threading

import numpy as np
import pytest
import torch

import pretrain
import train
from blur.estimator import BlurEstimator
from models import StudentCNN
from utils import UserError


class Elsewhere(torch.nn.Conv2d):
    """A network that is not a class of models.py."""


class Unpadded(torch.nn.Module):
    def __init__(self, width=4, fails=False):
        super().__init__()
        self.conv, self.fails, self.arguments = torch.nn.Conv2d(3, 3, 3), fails, dict(width=width, fails=fails)

    def forward(self, photo):
        return self.conv(photo[:, :2] if self.fails else photo)


class Pair(Unpadded):
    def forward(self, photo):
        return photo, photo


class Point(Unpadded):
    """One number for each color, of any type and with any value."""

    def __init__(self, value=1.0, dtype="float32", trained=True):
        super().__init__()
        del self.conv
        self.factor = torch.nn.Parameter(torch.full((3, 1, 1), value, dtype=getattr(torch, dtype)), requires_grad=trained)
        self.arguments = dict(value=value, dtype=dtype, trained=trained)

    def forward(self, photo):
        return (photo + self.factor).float()


class Estimating(Point):
    def __init__(self, value=1.0):
        super().__init__()
        self.estimator, self.arguments = BlurEstimator(kernel_radius=4), dict(value=value)


class Locked(Point):
    """Cannot be copied, as the averaged weights must be."""

    def __init__(self):
        super().__init__()
        self.lock, self.arguments = threading.Lock(), {}


class Forgetful(Unpadded):
    def __init__(self, width):
        super().__init__()
        self.arguments = {}


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: Elsewhere(3, 3, 1), "Elsewhere is not a class in models.py, where load_model looks for it: move it there"),
        (
            lambda: Unpadded(),
            "Unpadded turns a photo of shape (1, 3, 61, 67) into (1, 3, 59, 65): return one of the same shape",
        ),
        (
            lambda: Unpadded(fails=True),
            "built again with self.arguments, fails on a photo of shape (1, 3, 61, 67) (Given groups=1",
        ),
        (lambda: Pair(), "Pair turns a photo of shape (1, 3, 61, 67) into tuple: return one of the same shape"),
        (lambda: Point(float("nan")), "Point turns a black photo into values that are not finite"),
        (lambda: Point(trained=False), "Point has no parameter that requires a gradient"),
        (lambda: Point(dtype="bfloat16"), "Point has weights of torch.bfloat16: keep them in torch.float32"),
        (lambda: Estimating(), "'Estimating' object has no attribute 'estimate_blur'): fix forward()"),
        (
            lambda: Estimating(np.int64(3)),
            "(Object of type int64 is not JSON serializable): fix forward(), or the arguments",
        ),
        (lambda: Locked(), "(cannot pickle '_thread.lock' object): fix forward(), or the arguments"),
        (lambda: Forgetful(4), "missing 1 required positional argument: 'width'): fix"),
    ],
)
def test_a_network_of_ones_own_that_cannot_be_used_is_told_before_the_work(constants, monkeypatch, make, sentence):
    for kind in Unpadded, Pair, Point, Estimating, Locked, Forgetful:
        monkeypatch.setattr(f"models.{kind.__name__}", kind, raising=False)
    monkeypatch.setattr(train, "StudentCNN", make)
    with pytest.raises(UserError) as caught:
        train.main()
    assert sentence in str(caught.value) and not (constants / "outputs").exists()


class OnAnotherDevice(torch.nn.MSELoss):
    def __init__(self):
        super().__init__()
        self.weights = torch.ones(3, 1, 1, device="meta")  # no buffer, which would be moved with the loss

    def forward(self, prediction, target):
        return super().forward(self.weights * prediction, target)


@pytest.mark.parametrize(
    "make, sentence",
    [
        (
            lambda: torch.nn.MSELoss(reduction="none"),
            "MSELoss cannot be minimized on patches of shape (2, 3, 32, 32) (grad can",
        ),
        (OnAnotherDevice, "OnAnotherDevice cannot be minimized on patches of shape (2, 3, 32, 32) ("),
        (lambda: torch.nn.MSELoss, "MSELoss cannot be minimized"),
        (lambda: lambda prediction, target: 0.5, "'float' object has no attribute 'backward'): return one finite number"),
        (lambda: lambda prediction, target: prediction.mean() / 0, "it is inf): return one finite number"),
        (lambda: lambda prediction, target: (prediction > target).float().mean(), "does not require grad"),
        (torch.nn.BCELoss, "BCELoss cannot be minimized on patches of shape (2, 3, 32, 32) (all elements of input should"),
        (lambda: lambda prediction, target: torch.tensor(prediction.mean().item(), requires_grad=True), "has no gradient"),
        (lambda: lambda prediction, target: (prediction * 0).sum(), "it has no gradient): return one finite number that"),
        (lambda: torch.nn.PReLU(), "PReLU has parameters of its own, which are not trained: call its requires_grad_(False)"),
    ],
)
def test_a_loss_that_cannot_be_minimized_is_told_before_the_teacher_is_asked(constants, monkeypatch, make, sentence):
    loss = make()
    monkeypatch.setattr(train.nn, "MSELoss", lambda: loss)
    with pytest.raises(UserError) as caught:
        train.main()
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
    assert not (constants / "outputs").exists() and not list(constants.glob("data/*/.cache"))


def test_a_teacher_of_ones_own_is_tried_before_any_photo_is_decoded(constants, monkeypatch):
    monkeypatch.setattr("models.Pair", Pair, raising=False)
    monkeypatch.setattr(pretrain, "TeacherCNN", Pair)
    with pytest.raises(UserError, match="Pair turns a photo of .* into tuple"):
        pretrain.main()
    assert not list(constants.glob("data/*/.cache"))


def test_estimators_of_two_sizes_are_told_before_the_teacher_is_asked(constants, monkeypatch):
    def other():
        student = StudentCNN()
        student.estimator = BlurEstimator(kernel_radius=4)
        return student

    monkeypatch.setattr(train, "StudentCNN", other)
    monkeypatch.setattr(train, "cache_teacher_outputs", lambda *_: pytest.fail("it was asked"))
    with pytest.raises(UserError, match="the blur estimators of teacher and student differ in size"):
        train.main()
