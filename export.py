"""Exports a trained student to ONNX, for programs without PyTorch. Needs pip install -r requirements-extras.txt

    python export.py                                   writes student_blur.onnx and student_apply.onnx
    python export.py --like photo.jpg -o plain.onnx    one network, for photos as blurry as that one

Both ways a photo is (1, 3, H, W) float32 RGB in [0, 1], of any H, W >= 8, and so is the result. How the two graphs are run
is in docs/onnx.md.
"""

import copy
import importlib
import math
import warnings
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import blocks
import models
from blocks import FILTER_RADIUS, LUMA
from blur.noise import chroma_noise, with_noise
from blur.spectrum import WINDOW, average_spectrum, color_windows, gray_mean
from cli import CliParser, check_writable, run_cli
from images.files import atomic
from images.photos import read_photo
from models import StudentCNN, load_model
from utils import UserError, to_tensor

WEIGHTS = Path(__file__).resolve().parent / "weights" / "student.pth"
OUT = "student.onnx"
ANY = torch.export.Dim.DYNAMIC


def main() -> None:
    parser = CliParser(__doc__)
    parser.add_argument("-o", "--out", type=Path, default=OUT, help=f"a file; of two graphs, how both names begin ({OUT})")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help=f"of a student ({WEIGHTS.parent.name}/{WEIGHTS.name})")
    parser.add_argument("--like", type=Path, metavar="PHOTO", help="one plain network, for the blur of this photo")
    options = parser.parse_args()
    out = options.out
    if out.suffix.lower() != ".onnx":
        raise UserError(f"-o {out} must end in .onnx")
    check_writable(out.parent, "-o")
    files = [out] if options.like else [out.with_name(f"{out.stem}_{part}{out.suffix}") for part in ("blur", "apply")]
    for file in files:
        if file.is_dir():
            raise UserError(f"-o: {file} is a folder: choose another name")
    try:
        importlib.import_module("onnx"), importlib.import_module("onnxscript")
    except ImportError as error:
        raise UserError(f"export.py needs {error.name}: pip install -r requirements-extras.txt") from None
    student = load_model(options.weights).requires_grad_(False)
    if not isinstance(student, StudentCNN):
        raise UserError(f"{options.weights} contains a {type(student).__name__}: only a StudentCNN can be exported")
    like = options.like and to_tensor(read_photo(options.like))[None]
    programs = export_two(student) if like is None else [export_like(student, like)]
    for file, program in zip(files, programs, strict=True):
        with atomic(file) as partial:
            program.save(partial)
        print(f"{file} written, {file.stat().st_size / 1e6:.1f} MB")


class EstimateBlur(nn.Module):
    """``StudentCNN.estimate_blur`` for the windows (n, 64, 64, 3) of one photo and the trust (1,) in them -> (1, 637)."""

    def __init__(self, student: StudentCNN):
        super().__init__()
        self.student = student

    def forward(self, windows: Tensor, trust: Tensor) -> Tensor:
        windows = windows[None]
        spectra = average_spectrum(gray_mean(windows), trust, with_blurriest=True)
        return self.student.embed_blur(with_noise(spectra, chroma_noise(windows)))


class Apply(nn.Module):
    """``StudentCNN.forward`` for a known blur, and as a photo is stored, in [0, 1]."""

    def __init__(self, student: StudentCNN, blur: Tensor | None = None):
        super().__init__()
        self.student, self.blur = student, blur

    def forward(self, photo: Tensor, blur: Tensor | None = None) -> Tensor:
        return self.student(photo, self.blur if blur is None else blur).clamp(0, 1)


def export_two(student: StudentCNN) -> tuple:
    """``ONNXProgram`` of the blur estimate and of the rest, ``Apply``."""
    photo = torch.rand(1, 3, 67, 90)
    blur, windows = student.estimate_blur(photo), color_windows(photo)[0]
    estimate = export(EstimateBlur(student), {"windows": {0: ANY}, "trust": None}, (windows, torch.ones(1)), "blur")
    return estimate, export(Apply(student), {"photo": {2: ANY, 3: ANY}, "blur": None}, (photo, blur), "sharpened")


def export_like(student: StudentCNN, photo: Tensor):
    """``ONNXProgram`` of ``student`` with all that it predicts for ``photo``, (1, 3, H, W), as constants."""
    from onnxscript import optimizer  # an extra

    blur = student.estimate_blur(photo)
    weights, student = student.predict_weights(blur), copy.deepcopy(student)
    student.predict_weights = lambda blur: weights
    for conv in student.convs:
        mixed = conv.mix_experts(weights.routing)
        conv.mix_experts = lambda routing, mixed=mixed: mixed
    smooth_chroma = models.smooth_chroma if weights.chroma_limit.any() else lambda photo, limit: 0.0  # which takes time
    with mock.patch.object(models, "smooth_chroma", smooth_chroma):
        program = export(Apply(student, blur), {"photo": {2: ANY, 3: ANY}}, (torch.rand(1, 3, 67, 90),), "sharpened")
    # What follows from constants is computed now, also where it is larger than the exporter's limit
    optimizer.optimize(program.model, input_size_limit=2**16)
    return program


def export(network: nn.Module, inputs: dict[str, dict | None], example: tuple[Tensor, ...], output: str):
    """``ONNXProgram`` of ``network`` with dynamic axes as in ``inputs``, of which ``example`` is one.

    Raises ``UserError`` if these versions of torch and onnxscript cannot.
    """
    options = dict(dynamo=True, dynamic_shapes=inputs, input_names=list(inputs), output_names=[output], verbose=False)
    of_blocks = dict(reflect_pad_to_blocks=reflect_pad_to_blocks, luma=luma)
    with (
        mock.patch.multiple(torch.fft, rfft2=rfft2, irfft2=irfft2),
        mock.patch.multiple(blocks, **of_blocks),
        mock.patch.multiple(models, **of_blocks),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # of torch, about itself
        try:
            return torch.onnx.export(network.eval(), example, **options)
        except torch.onnx.errors.OnnxExporterError as error:
            reason = " ".join(str(error).split())[:120]
            raise UserError(f"torch {torch.__version__} cannot export it ({reason}): update torch and onnxscript") from None


# What does not export, or not as what every runtime knows, and what stands in for it: the same for one photo


class Complex(NamedTuple):
    real: Tensor
    imag: Tensor


def rfft2(x: Tensor, norm: str) -> Complex:
    cos, sin = waves()
    real, imag = x @ cos[:, : WINDOW // 2 + 1], -x @ sin[:, : WINDOW // 2 + 1]
    return Complex((cos @ real + sin @ imag) / WINDOW, (cos @ imag - sin @ real) / WINDOW)


def irfft2(x: Tensor, s: tuple[int, int]) -> Tensor:
    cos, sin = waves()
    twice = torch.tensor([1.0, *[2.0] * (WINDOW // 2 - 1), 1.0])[:, None]  # for the other, redundant half
    return (cos @ x @ (twice * cos[: len(twice)]) - sin @ x @ (twice * sin[: len(twice)])) / WINDOW**2


def waves() -> tuple[Tensor, Tensor]:
    angles = 2 * math.pi / WINDOW * (torch.arange(WINDOW)[:, None] * torch.arange(WINDOW) % WINDOW)
    return angles.cos(), angles.sin()


def reflect_pad_to_blocks(photo: Tensor) -> Tensor:
    for axis in -2, -1:
        last = photo.shape[axis] - 1
        indices = torch.arange(-FILTER_RADIUS, last + 1 + -(last + 1) % 4 + FILTER_RADIUS).abs()
        indices = (last - (last - indices).abs()).abs()  # twice, for photos smaller than what is added
        photo = photo.index_select(axis, last - (last - indices).abs())
    return photo


def luma(photo: Tensor) -> Tensor:
    return F.conv2d(photo, LUMA.view(1, 3, 1, 1))


if __name__ == "__main__":
    run_cli(main)
