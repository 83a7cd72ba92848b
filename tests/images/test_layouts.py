"""Public data sets, as they are unpacked."""

import re

import pytest
from photo_folders import names, save

from dataset import find_pairs


def make_gopro(root):
    for part, sequence in ("train", "GOPR1"), ("train", "GOPR2"), ("test", "GOPR3"):
        for k in range(2):
            for kind in "blur", "sharp", "blur_gamma":
                save(root / part / sequence / kind / f"00000{k}.png", seed=k)


def make_reds(root):
    for part, sequence in ("train", "000"), ("train", "001"), ("val", "000"):
        for k in range(2):
            for kind in "blur", "sharp":
                save(root / part / f"{part}_{kind}" / sequence / f"0000000{k}.png", seed=k)


def make_hide(root):
    for name in "1fromGOPR1", "2fromGOPR1", "1fromGOPR2", "2fromGOPR2":
        save(root / "train" / f"{name}.png")
        save(root / "GT" / f"{name}.png")
    for folder, name in ("test-close-ups", "1fromGOPR3"), ("test-long-shot", "2fromGOPR3"):
        save(root / "test" / folder / f"{name}.png")
        save(root / "GT" / f"{name}.png")


def make_realblur(root):
    for part, scenes in ("train", (1, 2)), ("test", (3,)):
        lines = []
        for scene in scenes:
            folder = f"RealBlur-J_ECC_IMCORR_centroid_itensity_ref/scene{scene:03d}"
            for k in (1, 2):
                save(root / folder / "gt" / f"gt_{k}.png")
                save(root / folder / "blur" / f"blur_{k}.png")
                lines.append(f"{folder}/gt/gt_{k}.png {folder}/blur/blur_{k}.png\n")
        (root / f"RealBlur_J_{part}_list.txt").write_text("".join(lines) + "\n")


LAYOUTS = {
    "gopro": (make_gopro, "GOPR1.000000"),
    "reds": (make_reds, "train-001.00000001"),
    "hide": (make_hide, "GOPR2.2fromGOPR2"),
    "realblur": (make_realblur, "scene002.blur_1"),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_public_data_set_is_taken_as_it_is_unpacked(prepare, tmp_path, kind):
    make, one = LAYOUTS[kind]
    make(tmp_path / "download")
    assert "4 pairs made in data/train, 2 in data/val" in prepare(kind, "download")
    assert len(find_pairs(tmp_path / "data/train")) == 4 and one in names(tmp_path / "data/train")
    assert "0 pairs made in data/train, 0 in data/val, 6 " in prepare(kind, "download")
    assert re.match("error: .*elsewhere.*: give the folder into which ", prepare(kind, "elsewhere"))


def test_a_frame_without_its_sharp_one_is_left_out_and_named(prepare, tmp_path):
    make_gopro(tmp_path / "download")
    (tmp_path / "download/train/GOPR1/sharp/000001.png").unlink()
    out = prepare("gopro", "download")
    assert "3 pairs made" in out and "GOPR1/sharp/000001.png is missing" in out


def test_a_sequence_in_both_parts_of_a_data_set_stays_out_of_training(prepare, tmp_path):
    make_hide(tmp_path / "download")
    for folder in "train", "GT":
        save(tmp_path / "download" / folder / "9fromGOPR3.png")
    out = prepare("hide", "download")
    assert "9fromGOPR3.png is left out: its group GOPR3 is in val/ already" in out
    assert not any("GOPR3" in name for name in names(tmp_path / "data/train"))
