"""What a training depends on: code without comments, weights, and nothing else."""

import ast
import inspect

import pytest
import torch
from torch import nn

import blocks
import models
from blur import filters, spectrum
from models import StudentCNN, TeacherCNN
from training import fingerprint as module
from training.fingerprint import code_fingerprint, fingerprint, identity_of, without_docstrings
from utils import RelativeMSEAndSSIMLoss

SMALL = dict(width=4, deep_width=8, blocks=1, fine_blocks=1)


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
    monkeypatch.setattr(models, "FILTER_RADIUS", 8)
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


def test_a_class_of_docstrings_alone_stays_valid_code():
    tree = without_docstrings(ast.parse('class A:\n    """Nothing else."""\n'))
    assert ast.unparse(tree) == "class A:\n    pass"
