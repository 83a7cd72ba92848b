"""The published protocol: luma, the border, and how photos are halved."""

import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import dummy_photo
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import set5

from utils import UserError


def test_luma_is_that_of_matlab():
    """rgb2ycbcr of MATLAB gives 16 for black and 235 for white, 81.5 for pure red, 144.6 for green, 41.0 for blue."""
    black = np.zeros((8, 8, 3), np.uint8)
    for color, y in ((255, 255, 255), 235), ((255, 0, 0), 81.481), ((0, 255, 0), 144.553), ((0, 0, 255), 40.966):
        painted = black + np.array(color, np.uint8)
        assert set5.psnr_of_luma(painted, black) == pytest.approx(20 * np.log10(255 / (y - 16)), abs=1e-3)


def test_the_border_does_not_count():
    photo = dummy_photo(20, 30, 0)
    damaged = photo.copy()
    damaged[:2], damaged[-2:], damaged[:, :2], damaged[:, -2:] = 0, 0, 0, 0
    damaged[10, 10, 0] ^= 1
    assert set5.psnr_of_luma(damaged, photo) > 60


def test_photos_are_cut_to_even_sides_and_lose_their_detail(tmp_path):
    Image.fromarray(dummy_photo(41, 63, 1)).save(tmp_path / "a.png")
    sharp, blurry = set5.halved_and_enlarged(tmp_path / "a.png")
    assert sharp.shape == blurry.shape == (40, 62, 3)
    small = Image.fromarray(sharp).resize((31, 20), Image.Resampling.BICUBIC)
    assert np.array_equal(blurry, np.array(small.resize((62, 40), Image.Resampling.BICUBIC)))
    Image.fromarray(dummy_photo(5, 5, 1)).save(tmp_path / "b.png")
    with pytest.raises(UserError, match="b.png is 4x4, too small"):
        set5.halved_and_enlarged(tmp_path / "b.png")


def test_pairs_are_made_for_both_parts(tmp_path, monkeypatch, capsys):
    (tmp_path / "photos").mkdir()
    for k in range(11):
        Image.fromarray(dummy_photo(20, 30, k)).save(tmp_path / "photos" / f"{k:02d}.png")
    monkeypatch.setattr("sys.argv", ["set5.py", "pairs", str(tmp_path / "photos"), str(tmp_path / "out")])
    set5.main()
    assert len(list(tmp_path.glob("out/train/*/blurry.png"))) == 9 and len(list(tmp_path.glob("out/val/*/sharp.png"))) == 2
    monkeypatch.setattr("sys.argv", ["set5.py", "score", str(tmp_path / "photos")])
    set5.main()
    printed = capsys.readouterr().out
    assert "mean of 11 photos" in printed and "bicubic, published" in printed and "VDSR, published" in printed
