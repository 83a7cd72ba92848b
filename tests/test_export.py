"""What ONNX Runtime computes with the exported networks, beside PyTorch."""

import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import dummy_photo, small_teacher
from PIL import Image

import export
from blur.filters import convolve, gaussian_kernel
from models import load_model, save_model
from utils import to_pixels, to_tensor

ROOT = Path(__file__).parent.parent
SIZES = [(203, 301), (64, 64), (33, 50), (8, 9), (96, 128)]  # of which few are multiples of 4 or 16
needs_extras = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime"))), reason="the extras are not installed"
)


def run_export(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["export.py", *map(str, arguments)])
    export.main()


def photo_of(size, noise=0):
    """(H, W, 3) uint8, blurry; without noise with runs of equal pixels."""
    pixels = to_pixels(convolve(to_tensor(dummy_photo(*size, seed=1)), gaussian_kernel(1.2)))
    return (pixels + np.random.default_rng(0).normal(0, noise, pixels.shape)).clip(0, 255).round().astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With both graphs, a plain network and what it was made like; exported once, which takes seconds."""
    folder = tmp_path_factory.mktemp("export")
    Image.fromarray(photo_of((160, 240), noise=5)).save(folder / "like.png")
    with pytest.MonkeyPatch.context() as patch:
        run_export(patch, "-o", folder / "student.onnx")
        run_export(patch, "-o", folder / "plain.onnx", "--like", folder / "like.png")
    return folder


@pytest.fixture(scope="module")
def student():
    return load_model(export.WEIGHTS).requires_grad_(False)


def example_of_the_docs(folder, monkeypatch):
    """The program in docs/onnx.md, run in ``folder``; its names."""
    code = re.search(r"```python\n(import math.*?)```", (ROOT / "docs" / "onnx.md").read_text(), re.DOTALL)[1]
    monkeypatch.chdir(folder)
    names = {}
    exec(code, names)
    return names


@pytest.mark.slow
@needs_extras
@pytest.mark.parametrize("size", SIZES)
def test_both_graphs_run_as_the_docs_say_give_what_the_student_gives(folder, student, size, monkeypatch):
    pixels = photo_of(size, noise=3)
    Image.fromarray(pixels).save(folder / "photo.png")
    example_of_the_docs(folder, monkeypatch)
    with Image.open(folder / "sharpened.png") as picture:
        result = np.array(picture).astype(int)
    assert result.shape == pixels.shape
    assert np.abs(result - to_pixels(student(to_tensor(pixels)[None])[0])).max() <= 1
    # A small photo shows little of its blur and is hardly changed
    assert min(size) < 200 or np.abs(result - pixels).max() > 5, "there is something to be compared"


@pytest.mark.slow
@needs_extras
@pytest.mark.parametrize("size", SIZES)
def test_the_plain_network_gives_what_the_student_gives_for_that_blur(folder, student, size):
    import onnxruntime

    plain = onnxruntime.InferenceSession(folder / "plain.onnx", providers=["CPUExecutionProvider"])
    photo = to_tensor(photo_of(size))[None]
    (result,) = plain.run(None, {"photo": photo.numpy()})
    with Image.open(folder / "like.png") as picture:
        blur = student.estimate_blur(to_tensor(np.array(picture))[None])
    assert student.predict_weights(blur).chroma_limit > 0.01, "chroma is smoothed, too"
    assert np.abs(result - student(photo, blur).clamp(0, 1).numpy()).max() < 0.5 / 255
    assert np.abs(result - photo.numpy()).max() > 5 / 255


@pytest.mark.slow
@needs_extras
def test_what_the_plain_network_predicts_is_constant(folder):
    import onnx

    nodes = onnx.load(folder / "plain.onnx").graph.node
    assert not {"MatMul", "Gemm", "TopK", "Asinh"} & {node.op_type for node in nodes}
    made = {name for node in nodes for name in node.output}
    assert not any(name in made for node in nodes if node.op_type == "Conv" for name in node.input[1:])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("-o", "student.pth"), "-o student.pth must end in .onnx"),
        (("-o", "like.png/student.onnx"), "-o: like.png is not a folder"),
        (("-o", "there.onnx", "--like", "like.png"), "-o: there.onnx is a folder: choose another name"),
        (("-o", "here.onnx"), "-o: here_apply.onnx is a folder"),
        (("--weights", "none.pth"), "none.pth is not a file"),
        (("--weights", "teacher.pth"), "teacher.pth contains a TeacherCNN: only a StudentCNN can be exported"),
        (("--like", "none.png"), "none.png is missing"),
        (("--like", "teacher.pth"), "teacher.pth cannot be read as an image"),
        (("photo.png",), "unrecognized arguments: photo.png"),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_is_exported(tmp_path, monkeypatch, arguments, sentence):
    for package in "onnx", "onnxscript":  # or what is said is that they are missing
        monkeypatch.setitem(sys.modules, package, sys)
    monkeypatch.chdir(tmp_path)
    save_model("teacher.pth", small_teacher())
    Image.new("RGB", (20, 20)).save("like.png")
    Path("there.onnx").mkdir(), Path("here_apply.onnx").mkdir()
    before = set(tmp_path.iterdir())
    with pytest.raises(export.UserError) as caught:
        run_export(monkeypatch, *arguments)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_is_one_sentence(tmp_path, monkeypatch, package):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "onnx", sys)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(export.UserError, match=f"export.py needs {package}: pip install -r requirements-extras.txt"):
        run_export(monkeypatch)


def test_the_stand_ins_for_transforms_give_what_torch_gives():
    windows, response = torch.randn(2, 64, 64), torch.randn(2, 64, 33)
    expected, found = torch.fft.rfft2(windows, norm="ortho"), export.rfft2(windows, "ortho")
    torch.testing.assert_close(torch.complex(found.real, found.imag), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(export.irfft2(response, (64, 64)), torch.fft.irfft2(response, s=(64, 64)), atol=1e-6, rtol=0)
