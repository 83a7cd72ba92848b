"""Mistakes of the user, each with its one sentence before the work."""

import io
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import dummy_photo, shipped
from PIL import Image
from tqdm import tqdm

import evaluate
import pretrain
import sharpen
import train
from blur.estimator import BlurEstimator
from cli import CliParser, check_writable, run_cli, whole_number
from dataset import PairedImageDataset
from images.photos import find_photos
from inference import Sharpener
from models import StudentCNN, save_model
from utils import UserError, pick_device

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "script, constant, value, sentence",
    [
        (train, "DATA", "~/photos", "DATA = '~/photos' starts with ~, which only a shell replaces: write the whole path"),
        (train, "DATA", None, "DATA = None is not a path: set it to one in quotes"),
        (train, "OUTPUTS", "", "OUTPUTS = '' is not a path"),
        (train, "TEACHER_WEIGHTS", 3, "TEACHER_WEIGHTS = 3 is not a path: set it to one in quotes"),
        (train, "TEACHER_WEIGHTS", "nowhere.pth", "nowhere.pth is not a file"),
        (train, "BEST_STUDENT", "data/train/001/sharp.png", "cannot be a file for weights"),
        (train, "BEST_STUDENT", "teacher.pth", "BEST_STUDENT and TEACHER_WEIGHTS are both teacher.pth"),
        (train, "BEST_STUDENT", "./outputs/student_last.pth", "is a file that the training itself writes: choose another"),
        (pretrain, "TEACHER", "outputs/estimator.pth", "TEACHER = 'outputs/estimator.pth' is a file that the training"),
        (train, "BEST_STUDENT", "teacher.pth/best.pth", "BEST_STUDENT: teacher.pth is not a folder"),
        (train, "OUTPUTS", "teacher.pth", "OUTPUTS: teacher.pth is not a folder"),
        (train, "RESUME", "False", "RESUME = 'False' is not True or False"),
        (train, "CACHE_TEACHER", 1, "CACHE_TEACHER = 1 is not True or False"),
        (train, "LEARNING_RATE", 10**30, "is not a number above 0"),
        (train, "NUM_EPOCHS", 2**61, "is not a whole number"),
        (train, "DEVICE", "hpu", "DEVICE = 'hpu' cannot be used here"),
        (pretrain, "START_FROM", "nowhere.pth", "nowhere.pth is not a file"),
        (pretrain, "PHOTOS", 7, "PHOTOS = 7 is not a path"),
        (pretrain, "VAL_PHOTOS", "data/val", "VAL_PHOTOS = 'data/val' needs PHOTOS"),
        (pretrain, "TEACHER", "data", "cannot be a file for weights"),
    ],
)
def test_a_wrong_constant_is_told_before_any_photo_is_decoded(constants, monkeypatch, script, constant, value, sentence):
    monkeypatch.setattr(script, constant, value)
    with pytest.raises(UserError) as caught:
        script.main()
    assert sentence in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert not (constants / "outputs").exists() and not list(constants.glob("data/*/.cache"))


def test_weights_to_start_from_are_never_overwritten(constants, monkeypatch):
    monkeypatch.setattr(pretrain, "START_FROM", "teacher.pth")
    monkeypatch.setattr(pretrain, "TEACHER", "./teacher.pth")
    with pytest.raises(UserError, match="TEACHER and START_FROM are both ./teacher.pth, which would be overwritten"):
        pretrain.main()


def test_pairs_are_not_taken_for_sharp_photos_to_blur(constants, monkeypatch):
    monkeypatch.setattr(pretrain, "PHOTOS", "data/train")
    with pytest.raises(UserError, match="data/train contains pairs, such as data/train/00.: give a folder of single photos"):
        pretrain.main()


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
        (lambda: Forgetful(4), "missing 1 required positional argument: 'width'): fix"),
    ],
)
def test_a_network_of_ones_own_that_cannot_be_used_is_told_before_the_work(constants, monkeypatch, make, sentence):
    for kind in Unpadded, Pair, Point, Estimating, Forgetful:
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


def test_with_stderr_closed_the_work_is_done_all_the_same(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)  # as under pythonw
    done = []
    run_cli(lambda: done.extend(tqdm([1, 2])))
    assert done == [1, 2]


def test_one_folder_is_not_both_parts(pairs):
    for file in sorted((pairs / "val").rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    (pairs / "val").rmdir()
    (pairs / "val").symlink_to(pairs / "train")
    with pytest.raises(UserError, match="are the same folder: validate on other pairs"):
        PairedImageDataset(pairs / "val")


@pytest.mark.parametrize("script, photos", [(train, None), (pretrain, None), (pretrain, "some")])
def test_a_photo_to_train_on_is_not_validated_on_whatever_its_name(constants, monkeypatch, script, photos):
    shutil.copytree("data/train/002", "data/val/other")
    Path("some").mkdir()
    for name, seed in ("1", 1), ("2", 2), ("3", 1):
        Image.fromarray(dummy_photo(40, 52, seed)).save(f"some/{name}.png")
    monkeypatch.setattr(pretrain, "PHOTOS", photos)
    pairs = r"data/train/002/blurry\.png and data/val/other/blurry\.png are the same picture .and 1 more like these.: train"
    with pytest.raises(UserError, match="some/3.png and some/1.png are the same picture: train on" if photos else pairs):
        script.main()


@pytest.mark.parametrize("text", ["0", "-3", "1.5", "x", "", "9" * 30])
def test_an_argument_out_of_range_is_one_sentence(text):
    parser = CliParser("test")
    parser.add_argument("--photos", type=whole_number(1))
    with pytest.raises(UserError, match="--photos: .* is not a whole number from 1 to"):
        parser.parse_args(["--photos", text] if not text.startswith("-") else [f"--photos={text}"])


def test_a_folder_below_a_file_is_told_and_a_new_one_is_not_made(tmp_path):
    (tmp_path / "file").touch()
    check_writable(tmp_path / "a" / "b", "OUT")
    with pytest.raises(UserError, match="OUT: .*file is not a folder"):
        check_writable(tmp_path / "file" / "b", "OUT")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["hpu", "abacus", "cuda:99", None])
def test_any_unknown_device_is_a_short_sentence(name):
    with pytest.raises(UserError) as caught:
        pick_device(name)
    assert len(str(caught.value)) < 260 and "\n" not in str(caught.value)


# Results of evaluate.py and sharpen.py


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--markdown", "data/val/001/sharp.png"], "sharp.png: name a file that ends in .md, no folder and no input"),
        (["--picture", "p.heic"], "p.heic: name a file that ends in .png or"),
        (["--csv", str(ROOT / "weights" / "student.pth")], "student.pth: name a file that ends in .csv"),
        (["--csv", "data/val/001/sharp.png/x.csv"], "is not a folder"),
        (["--picture", "data/train/../val/001/sharp.png"], "sharp.png: name a file .* no input"),
        (["--picture", "taken.png"], "taken.png: name a file .* no folder"),
    ],
)
def test_a_result_that_cannot_be_written_is_told_before_the_scoring(pairs, tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.png").mkdir()
    monkeypatch.setattr("sys.argv", ["evaluate.py", "data/val", *arguments])
    monkeypatch.setattr(evaluate, "score_degradation", lambda *_: pytest.fail("it was scored"))
    with pytest.raises(UserError, match=sentence):
        evaluate.main()


def test_links_that_lead_nowhere_are_not_passed_over(tmp_path):
    (tmp_path / "a.png").symlink_to(tmp_path / "nowhere.png")
    assert find_photos(tmp_path) == [tmp_path / "a.png"]


def test_a_pipe_under_the_name_of_a_photo_is_passed_over(tmp_path):
    Image.fromarray(dummy_photo(8, 8, 0)).save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "b.png").symlink_to(tmp_path / "pipe")  # reading it would wait for ever
    assert find_photos(tmp_path) == [tmp_path / "a.png"]


@pytest.fixture
def sharpened(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_model("best_student_model.pth", StudentCNN(convs=1, num_experts=1, hidden=2))
    Image.fromarray(dummy_photo(40, 52, 0)).save("a.png")

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["sharpen.py", *arguments])
        try:
            sharpen.main()
        except UserError as error:
            return str(error)
        except SystemExit:
            pass
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["missing.png"], "missing.png is missing"),
        (["missing"], "missing is missing"),
        (["a.png", "-o", "a.png/x"], "-o: a.png is not a folder"),
        (["a.png", "--strength", "abc"], "argument --strength: invalid float value"),
        (["a.png", "--foo"], "unrecognized arguments: --foo"),
        (["pipe.png"], "pipe.png is missing or not a file"),
    ],
)
def test_a_mistake_with_sharpen_is_one_sentence(sharpened, tmp_path, arguments, sentence):
    os.mkfifo(tmp_path / "pipe.png")
    said = sharpened(*arguments)
    assert sentence in said and len(said.splitlines()) == 1 and not (tmp_path / "sharpened").exists()


def test_a_name_of_two_lines_is_told_in_one(sharpened, tmp_path):
    (tmp_path / "two\nlines.png").write_text("no picture")
    said = sharpened("two\nlines.png", "gone\n.png")
    assert len(said.splitlines()) == 2 and "two\\nlines.png cannot be read" in said


def test_a_photo_named_twice_is_sharpened_once(sharpened, tmp_path):
    (tmp_path / "folder").mkdir()
    Image.fromarray(dummy_photo(40, 52, 0)).save(tmp_path / "folder" / "a.png")
    assert sharpened("folder", "folder/a.png", "folder/../folder/a.png") == ""
    assert [path.name for path in (tmp_path / "sharpened").iterdir()] == ["a.png"]


def test_no_frames_at_all_are_a_failure(sharpened, monkeypatch):
    empty = type("", (), {"buffer": io.BytesIO(), "flush": lambda: None})
    monkeypatch.setattr(sys, "stdin", empty)
    monkeypatch.setattr(sys, "stdout", empty)
    assert "no frames came in" in sharpened("--frames", "8x8")


def test_weights_that_overflow_write_no_picture(sharpened, tmp_path, monkeypatch):
    student = StudentCNN(convs=1, num_experts=1, hidden=2)
    torch.nn.init.constant_(student.convs[0].base.weight, 1e38)
    save_model(tmp_path / "huge.pth", student)
    assert "output is not finite" in sharpened("a.png", "--weights", "huge.pth")
    monkeypatch.setattr(sys, "stdin", type("", (), {"buffer": io.BytesIO(bytes(range(192)))}))
    monkeypatch.setattr(sys, "stdout", type("", (), {"buffer": io.BytesIO()}))
    assert "output is not finite" in sharpened("--frames", "8x8", "--weights", "huge.pth")
    assert not sys.stdout.buffer.getvalue()
    assert not list(tmp_path.rglob("sharpened/*"))


@pytest.mark.parametrize("size", [(1, 60), (3, 300), (8, 8), (30, 40), (64, 64), (100, 100)])
@pytest.mark.parametrize("name", ["student", "teacher"])
def test_a_photo_too_small_to_tell_its_blur_is_not_ruined(size, name):
    rng = np.random.default_rng(0)
    rows, columns = np.cumsum(rng.normal(0, 9, size[0])), np.cumsum(rng.normal(0, 9, size[1]))
    photo = np.clip(128 + rows[:, None, None] + columns[:, None] + np.zeros(3), 0, 255).astype(np.uint8)
    change = Sharpener(shipped(name), torch.device("cpu"))(photo).astype(float) - photo
    assert np.sqrt(np.square(change).mean()) < 6


def test_a_photo_that_does_not_fit_in_memory_is_said_and_the_rest_goes_on(sharpened, tmp_path, monkeypatch):
    Image.fromarray(dummy_photo(50, 60, 0)).save("large.png")
    work = Sharpener.__call__

    def short_of_memory(sharpener, pixels, *others):
        if pixels.shape[0] == 50:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return work(sharpener, pixels, *others)

    monkeypatch.setattr(Sharpener, "__call__", short_of_memory)
    assert "large.png does not fit in memory: lower TILE" in sharpened("large.png", "a.png")
    assert [path.name for path in (tmp_path / "sharpened").iterdir()] == ["a.png"]
