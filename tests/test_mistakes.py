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
from cli import CliParser, check_writable, run_cli, whole_number
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


def test_with_stderr_closed_the_work_is_done_all_the_same(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)  # as under pythonw
    done = []
    run_cli(lambda: done.extend(tqdm([1, 2])))
    assert done == [1, 2]


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
