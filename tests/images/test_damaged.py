"""Hundreds of damaged picture files through sharpen.py and the data set: a picture or a sentence, and nothing else."""

import io

import numpy as np
import pytest
import torch
from conftest import dummy_photo
from PIL import Image

import sharpen
from dataset import PairedImageDataset
from images.photos import read_photo
from images.pictures import read_picture
from models import StudentCNN, save_model
from utils import UserError

COPIES = 30  # damaged files of each kind
KINDS = {  # suffix, mode and options for Pillow's save()
    "png": (".png", "RGB", dict(format="PNG")),
    "png with a palette": (".png", "P", dict(format="PNG")),
    "png of 16 bits": (".png", "I;16", dict(format="PNG")),
    "png with alpha": (".png", "RGBA", dict(format="PNG")),
    "jpeg": (".jpg", "RGB", dict(format="JPEG", quality=80)),
    "progressive jpeg": (".jpeg", "L", dict(format="JPEG", progressive=True)),
    "webp": (".webp", "RGB", dict(format="WEBP")),
    "lossless webp": (".webp", "RGBA", dict(format="WEBP", lossless=True)),
    "tiff": (".tif", "RGB", dict(format="TIFF")),
    "tiff, lzw": (".tiff", "RGB", dict(format="TIFF", compression="tiff_lzw")),
    "tiff, deflate": (".tif", "L", dict(format="TIFF", compression="tiff_adobe_deflate")),
    "tiff, jpeg": (".tif", "RGB", dict(format="TIFF", compression="jpeg")),
    "tiff, packbits, alpha": (".tif", "RGBA", dict(format="TIFF", compression="packbits")),
    "bmp": (".bmp", "RGB", dict(format="BMP")),
    "bmp with a palette": (".bmp", "P", dict(format="BMP")),
    "gif, misnamed": (".png", "P", dict(format="GIF")),
    "ppm, misnamed": (".jpg", "RGB", dict(format="PPM")),
    "tga, misnamed": (".bmp", "RGB", dict(format="TGA")),
    "jpeg 2000, misnamed": (".jpg", "RGB", dict(format="JPEG2000")),
}


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """``content`` with bytes flipped, cut off, zeroed, doubled or skipped at random."""
    values = np.frombuffer(content, np.uint8).copy()
    place = int(rng.integers(len(values)))
    length = int(rng.integers(1, max(2, len(values) // 8)))
    way = rng.integers(5)
    if way == 0:  # the beginning, which says what all the rest means, as often as the rest
        places = rng.integers(rng.choice([64, len(values)]), size=rng.integers(1, 9)) % len(values)
        values[places] ^= rng.integers(1, 256, places.shape, np.uint8)
    elif way == 1:
        values = values[:place]
    elif way == 2:
        values[place : place + length] = 0
    elif way == 3:
        values = np.concatenate([values[: place + length], values[place:]])
    else:
        values = np.concatenate([values[:place], values[place + length :]])
    return values.tobytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    for number, (kind, (suffix, mode, options)) in enumerate(KINDS.items()):
        picture = Image.fromarray(dummy_photo(30, 40, seed=number))
        picture = (
            Image.fromarray(dummy_photo(30, 40, 1)[..., 0].astype(np.uint16) * 257)
            if mode == "I;16"
            else picture.convert(mode)
        )
        stream = io.BytesIO()
        picture.save(stream, **options)
        for copy in range(COPIES):
            name = f"{kind.replace(' ', '_').replace(',', '')}-{copy:02d}{suffix}"
            (folder / name).write_bytes(damaged(stream.getvalue(), np.random.default_rng([number, copy])))
    return folder


def test_each_is_sharpened_or_has_its_sentence(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_model("best_student_model.pth", StudentCNN())
    monkeypatch.setattr("sys.argv", ["sharpen.py", str(folder), "-o", "out"])
    with pytest.raises(SystemExit) as ended:
        sharpen.main()
    printed, errors = capsys.readouterr()
    results = {path.name for path in (tmp_path / "out").iterdir()}
    sentences = errors.splitlines()
    assert ended.value.code == 1 and all(line.startswith(f"error: {folder}") or " out/" in line for line in sentences), (
        errors
    )
    assert len(results) + len(sentences) == len(list(folder.iterdir()))
    assert f"{len(results)} of {len(results) + len(sentences)} files sharpened" in printed
    assert 20 < len(results) < 500, "some damage cannot be seen, most can"
    for name in results:  # each is whole, and of the size that the damaged file tells
        assert read_picture(tmp_path / "out" / name).pixels.shape == read_picture(folder / name).pixels.shape


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # run_cli ignores them, too
def test_each_is_read_or_has_its_sentence_before_a_training(folder, tmp_path):
    good, bad = [], []
    for path in sorted(folder.iterdir()):
        try:
            pixels = read_photo(path)
        except UserError as error:  # noqa: PERF203
            assert str(path) in str(error) and "\n" not in str(error)
            bad.append(path)
        else:
            assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
            good.append(path)
    assert len(good) > 20 and len(bad) > 200
    for k, path in enumerate(bad[::40]):
        for name in "blurry.png", "sharp.png":
            (tmp_path / f"{k:03d}").mkdir(exist_ok=True)
            (tmp_path / f"{k:03d}" / name).write_bytes(path.read_bytes())
    with pytest.raises(UserError) as caught:
        PairedImageDataset(tmp_path)
    assert str(caught.value).startswith(f"{2 * len(bad[::40])} problems with the data")
