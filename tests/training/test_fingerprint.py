"""What a training depends on: code without comments, weights, and nothing else."""

import copy
import functools
import inspect

import pytest
import torch
from torch import nn

import blocks
import models
import utils
from blur import filters, spectrum
from models import StudentCNN, TeacherCNN
from training import fingerprint as module
from training.fingerprint import code_fingerprint, fingerprint, identity_of
from utils import RelativeMSEAndSSIMLoss

SMALL = dict(width=4, deep_width=8, hidden=[8], fine_blocks=1)


def test_a_fingerprint_changes_with_any_weight_and_with_nothing_else():
    network = StudentCNN(convs=2, num_experts=3, hidden=8)
    before = fingerprint(network)
    assert fingerprint(network.to(memory_format=torch.channels_last)) == before
    with torch.no_grad():
        network.router.bias[0] += 1e-3
    assert fingerprint(network) != before


def edited(monkeypatch, code, edit):
    """As if the source of ``code`` had been edited."""
    source_of = inspect.getsource
    monkeypatch.setattr(
        module.inspect, "getsource", lambda other: edit(source_of(other)) if other is code else source_of(other)
    )


@pytest.mark.parametrize(
    "code",
    [TeacherCNN, blocks.modulate, blocks.ResidualBlock, filters.convolve_valid, spectrum.log_means, filters.reflect_indices],
)
def test_it_changes_with_the_code_of_any_part_that_the_network_uses(monkeypatch, code):
    network = TeacherCNN(**SMALL)
    before = fingerprint(network)
    edited(monkeypatch, code, lambda source: source.replace("return ", "return 1 * ", 1).replace("super()", "super( )"))
    if code is TeacherCNN:
        edited(monkeypatch, code, lambda source: source.replace("F.relu", "F.gelu"))
    assert fingerprint(network) != before


@pytest.mark.parametrize("code", [TeacherCNN, blocks.modulate, filters.convolve_valid])
def test_comments_docstrings_and_formatting_do_not_count(monkeypatch, code):
    network = TeacherCNN(**SMALL)
    before = fingerprint(network)
    edited(monkeypatch, code, lambda source: source.replace('"""', '"""Another sentence. ', 1) + "\n    # a comment\n")
    assert fingerprint(network) == before


def test_code_that_the_network_does_not_use_does_not_count(monkeypatch):
    before = code_fingerprint(TeacherCNN)
    edited(monkeypatch, models.save_model, lambda source: source.replace("return", "yield") + "\n    pass\n")
    edited(monkeypatch, blocks.CondConv2d, lambda source: source + "\n    x = 1\n")
    assert code_fingerprint(TeacherCNN) == before


def test_constants_that_the_code_reads_count(monkeypatch):
    before = code_fingerprint(StudentCNN)
    monkeypatch.setattr(models, "FILTER_RADIUS", 4)
    assert code_fingerprint(StudentCNN) != before


def test_an_identity_has_no_addresses_and_tells_losses_apart():
    class WithCallback(nn.MSELoss):
        def __init__(self, weight):
            super().__init__()
            self.weight, self.callback = weight, lambda: None

    network = StudentCNN(convs=1, num_experts=1, hidden=2)
    assert identity_of(network, WithCallback(1.0)) == identity_of(network, WithCallback(1.0))
    losses = [
        WithCallback(1.0),
        WithCallback(2.0),
        nn.MSELoss(),
        nn.L1Loss(),
        RelativeMSEAndSSIMLoss(),
        RelativeMSEAndSSIMLoss(ssim_weight=1.0),
    ]
    assert len({identity_of(network, loss)["the loss"] for loss in [*losses, nn.functional.l1_loss]}) == 7


WEIGHTS = {"l1": 0.5, "steps": [1, 2]}


class Weighted(nn.Module):
    def __init__(self, base, buffer=1.0):
        super().__init__()
        self.base = base
        self.register_buffer("weight", torch.tensor(buffer))

    def forward(self, prediction, target):
        return self.weight * self.base(prediction, target)


def closing_over(weight):
    class Loss(nn.Module):
        def forward(self, prediction, target):
            return weight * (prediction - target).abs().mean()

    return Loss(), lambda prediction, target: weight * (prediction - target).abs().mean()


def reads_a_dict(prediction, target):
    return WEIGHTS["l1"] * (prediction - target).abs().mean()


def reads_another_file(prediction, target):
    return (prediction - target).abs().clamp(max=utils.MAX_PSNR).mean()


def test_any_constant_of_a_loss_of_ones_own_counts(monkeypatch):
    network = nn.Conv2d(1, 1, 1)
    smooth = nn.functional.smooth_l1_loss
    one_and_other = {
        "sub-module": (Weighted(nn.SmoothL1Loss(beta=1.0)), Weighted(nn.SmoothL1Loss(beta=2.0))),
        "its class": (Weighted(nn.L1Loss()), Weighted(nn.MSELoss())),
        "buffer": (Weighted(nn.L1Loss(), 1.0), Weighted(nn.L1Loss(), 2.0)),
        "argument": (functools.partial(smooth, beta=1.0), functools.partial(smooth, beta=2.0)),
        "function": (functools.partial(smooth), functools.partial(nn.functional.huber_loss)),
        "module around it": (closing_over(0.1)[0], closing_over(0.2)[0]),
        "function around it": (closing_over(0.1)[1], closing_over(0.2)[1]),
    }
    for kind, losses in one_and_other.items():
        one, again, other = (identity_of(network, loss) for loss in (losses[0], copy.deepcopy(losses[0]), losses[1]))
        assert one == again and [name for name in one if one[name] != other[name]], kind
    before = [identity_of(network, loss) for loss in (reads_a_dict, reads_another_file)]
    monkeypatch.setitem(WEIGHTS, "l1", 0.6)
    monkeypatch.setattr(utils, "MAX_PSNR", 51.0)
    for was, loss in zip(before, (reads_a_dict, reads_another_file), strict=True):
        now = identity_of(network, loss)
        assert [name for name in now if now[name] != was[name]] == ["the code and parts of the loss"]


def test_a_loss_that_is_any_function_has_an_identity():
    cases = [torch.cosine_similarity, nn.functional.l1_loss, (  # a lambda in lines that are not valid code alone
        lambda prediction, target: (prediction - target).abs().mean())]  # fmt: skip
    assert len({identity_of(nn.Conv2d(1, 1, 1), loss)["the code and parts of the loss"] for loss in cases}) == 3
