"""What a training prints and draws."""

import csv
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import train
from dataset import PairedImageDataset
from training import report
from utils import Scores, UserError, to_pixels

CPU = torch.device("cpu")


def history(*values):
    """One epoch for each PSNR of the student."""
    scores = (dict(input_psnr=20.0, input_ssim=0.5, student_psnr=value, student_ssim=value / 50) for value in values)
    return [dict(epoch=epoch, loss=0.1, seconds=1.0) | each for epoch, each in enumerate(scores, start=1)]


def test_the_table_of_epochs_reads_back_as_it_was_written(tmp_path):
    rows = history(21.5, 22.25)
    report.write_table(tmp_path / "epochs.csv", rows)
    with open(tmp_path / "epochs.csv", newline="") as file:
        assert [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)] == rows


@pytest.mark.parametrize("values", [[21.0], [22.0, 22.0], [21.0, 24.0, 23.0]])
def test_curves_are_drawn_for_one_epoch_for_equal_values_and_for_many(tmp_path, values):
    report.draw_curves(tmp_path / "curves.png", history(*values))
    with Image.open(tmp_path / "curves.png") as picture:
        pixels = np.array(picture)
    for name in "input", "student":
        color = [int(report.COLORS[name][i : i + 2], 16) for i in (1, 3, 5)]
        rows, columns = np.nonzero((pixels == color).all(-1))
        inside = (rows > 50) & (rows < 350)  # the rest is the legend
        for left, right in (70, 500), (590, 1020):
            assert (inside & (columns >= left - 2) & (columns <= right + 2)).any(), f"{name} is not drawn"


def test_a_rising_curve_rises(tmp_path):
    report.draw_curves(tmp_path / "curves.png", history(21.0, 24.0))
    with Image.open(tmp_path / "curves.png") as picture:
        red = (np.array(picture)[50:350, :560] == [0xD6, 0x27, 0x28]).all(-1)
    rows, columns = np.nonzero(red)
    assert rows[columns.argmax()] < rows[columns.argmin()] - 100


def test_tensorboard_gets_each_epoch_and_the_pictures(constants, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setattr(train, "TENSORBOARD", True)
    train.main()
    logs = accumulator.EventAccumulator(str(constants / "outputs" / "tensorboard"))
    logs.Reload()
    with open(constants / "outputs" / "student_epochs.csv", newline="") as file:
        expected = [float(row["student_ssim"]) for row in csv.DictReader(file)]
    events = logs.Scalars("student_ssim")
    assert [event.step for event in events] == [1, 2] and [event.value for event in events] == pytest.approx(expected)
    assert logs.Images("comparison_1")[0].encoded_image_string.startswith(b"\x89PNG")


def test_without_tensorboard_its_constant_is_one_sentence(constants, monkeypatch):
    monkeypatch.setattr(train, "TENSORBOARD", True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="^TENSORBOARD = True needs a package: pip install tensorboard$"):
        train.main()


def test_photos_of_the_blurrier_half_are_compared(pairs, tmp_path):
    val_set = PairedImageDataset(pairs / "val")  # one of two is in it
    run = SimpleNamespace(outputs=tmp_path, device=torch.device("cpu"), writer=None)
    report.draw_comparison(run, val_set, {"student": nn.Identity()})
    assert [path.name for path in tmp_path.glob("comparison_*")] == ["comparison_1.png"]
    with Image.open(tmp_path / "comparison_1.png") as picture:
        assert picture.width == 3 * report.COLUMN + 2 * 6


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (400, 30), (500, 700)])
def test_photos_of_any_size_are_compared(size):
    blurry, sharp = torch.rand(2, 3, *size)
    picture = report.side_by_side({"blurry": blurry, "sharp": sharp})
    assert picture.width == 2 * report.COLUMN + 6 and len(picture.getcolors(1 << 24)) > 1


def test_the_crop_is_where_the_images_differ_most():
    sharp = torch.rand(3, 200, 300)
    blurry = sharp.clone()
    blurry[:, 120:150, 210:240] += 0.2
    picture = report.side_by_side({"blurry": blurry, "sharp": sharp})
    size, pixels = report.COLUMN // report.ZOOM, to_pixels(sharp)
    crop = np.array(picture)[-size * report.ZOOM :: report.ZOOM, -report.COLUMN :: report.ZOOM]
    places = [
        (top, left)
        for top in range(0, 111)
        for left in range(0, 211)
        if np.array_equal(crop[0], pixels[top, left : left + size])
    ]
    ((top, left),) = places
    assert top <= 120 <= 150 <= top + size and left <= 210 <= 240 <= left + size


def test_the_share_of_the_teachers_gain_is_printed(capsys, monkeypatch):
    monkeypatch.setattr(report, "ms_per_megapixel", lambda network, device: 12.5)
    scores = {"input": Scores(20, 0.8), "student": Scores(23, 0.85), "teacher": Scores(24, 0.9)}
    report.print_summary({"student": nn.Linear(2, 3), "teacher": nn.Identity()}, scores, CPU)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines if line.startswith("student")] == [
        ["student", "23.00", "0.8500", "75%", "/", "50%", "9", "12.5"]
    ]
