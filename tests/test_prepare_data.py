import io
import re

import numpy as np
import pytest
from conftest import dummy_photo
from photo_folders import names, pixels, save, save_photos
from PIL import Image

import prepare_data
from blur.degradations import Mixture
from dataset import PairedImageDataset
from images.photos import read_photo


@pytest.fixture
def without_camera(monkeypatch):
    """Nothing is drawn on the sharp photos, none is made black and white."""
    monkeypatch.setattr("prepare_data.MIXTURE", Mixture(camera=0))


def test_photos_become_pairs_that_the_data_set_takes(prepare, without_camera, tmp_path):
    for k in range(10):
        save(tmp_path / "photos" / "holiday" / f"beach {k}.png", seed=k)
    out = prepare("photos", "photos")
    assert (
        "9 pairs made in data/train, 1 in data/val, 0 existed already" in out and "skipped" not in out and not prepare.code
    )
    assert len(PairedImageDataset(tmp_path / "data/train", 128)) == 9
    for folder in (tmp_path / "data").glob("*/h*"):
        source = tmp_path / "photos" / "holiday" / f"{folder.name.removeprefix('holiday_').replace('_', ' ')}.png"
        assert np.array_equal(read_photo(folder / "sharp.png"), read_photo(source))
        assert read_photo(folder / "blurry.png").shape == (128, 136, 3)


def test_the_same_seed_gives_the_same_pairs_and_another_one_others(prepare, tmp_path):
    save_photos(tmp_path, 6)
    for out, seed in ("a", 1), ("b", 1), ("c", 2):
        prepare("photos", "photos", "--out", out, "--seed", seed)
    assert pixels(tmp_path / "a") == pixels(tmp_path / "b") != pixels(tmp_path / "c")


def test_two_folders_can_be_the_two_parts(prepare, tmp_path):
    for k in range(5):
        save(tmp_path / ("many" if k < 3 else "few") / f"{k}.png", seed=k)
    assert "3 pairs made in data/train, 0 in data/val" in prepare("photos", "many", "--val-share", 0)
    assert "0 pairs made in data/train, 2 in data/val" in prepare("photos", "few", "--val-share", 1)
    assert {name[0] for name in names(tmp_path / "data/val")} == {"3", "4"}


def test_tiles_and_copies_of_a_photo_are_all_on_one_side_and_together_are_the_photo(prepare, without_camera, tmp_path):
    save_photos(tmp_path, 4, height=270, width=300)
    out = prepare("photos", "photos", "--tile", 150, "--copies", 4, "--val-share", 0.5)
    assert "32 pairs made in data/train, 32 in data/val" in out
    sides = {part: {name[0] for name in names(tmp_path / "data" / part)} for part in ("train", "val")}
    assert not sides["train"] & sides["val"] and len(sides["train"]) == len(sides["val"]) == 2
    for part, photos in sides.items():
        for k in photos:
            tiles = [[read_photo(tmp_path / f"data/{part}/{k}.r{r}c{c}/sharp.png") for c in (0, 1)] for r in (0, 1)]
            whole = np.concatenate([np.concatenate(row, axis=1) for row in tiles])
            assert np.array_equal(whole, read_photo(tmp_path / "photos" / f"{k}.png"))
            crisper = read_photo(tmp_path / f"data/{part}/{k}.r0c0.copy1/sharp.png")
            assert 128 <= crisper.shape[0] < 135 and crisper.shape[1] < 150
            softer = read_photo(tmp_path / f"data/{part}/{k}.r0c0.copy3/sharp.png")
            assert 135 < softer.shape[0] <= 216 and 150 < softer.shape[1] <= 240


def test_blurry_photos_are_cut_into_tiles_to_train_on_and_have_no_sharp_ones(prepare, tmp_path):
    save_photos(tmp_path, 2, height=270, width=300)
    out = prepare("blurry", "photos", "--tile", 150)
    assert "8 pairs made in data/train, 0 in data/val" in out
    tiles = [[read_photo(tmp_path / f"data/train/0.r{r}c{c}/blurry.png") for c in (0, 1)] for r in (0, 1)]
    whole = np.concatenate([np.concatenate(row, axis=1) for row in tiles])
    assert np.array_equal(whole, read_photo(tmp_path / "photos" / "0.png"))
    assert not list((tmp_path / "data").rglob("sharp.png"))
    assert "0 pairs made in data/train, 0 in data/val, 8 existed already" in prepare("blurry", "photos", "--tile", 150)


def test_blurry_photos_that_are_validated_on_are_not_trained_on(prepare, tmp_path):
    save_photos(tmp_path, 3)
    prepare("photos", "photos")
    (held_out,) = names(tmp_path / "data/val")
    out = prepare("blurry", "photos", "--out", "data")
    assert f"photos/{held_out}.png is left out: its group {held_out} is in val/ already" in out and prepare.code == 1
    assert len(names(tmp_path / "data/train")) == 2


def test_no_tile_is_too_small_for_a_patch(prepare, tmp_path):
    save_photos(tmp_path, 2, height=129, width=300)
    prepare("photos", "photos", "--tile", 128)
    shapes = {read_photo(path).shape for path in (tmp_path / "data").rglob("*.png")}
    assert shapes == {(129, 150, 3)}


def test_large_photos_are_shrunk_first_where_that_is_asked_for(prepare, tmp_path):
    save_photos(tmp_path, 2, height=300, width=400)
    prepare("photos", "photos", "--longest", 200)
    assert {read_photo(path).shape for path in (tmp_path / "data").rglob("*.png")} == {(150, 200, 3)}


def test_a_second_run_makes_what_is_missing_and_changes_nothing_that_is_there(prepare, tmp_path):
    save_photos(tmp_path, 6)
    prepare("photos", "photos")
    before = pixels(tmp_path / "data")
    gone = next((tmp_path / "data" / "train").iterdir())
    for file in gone.iterdir():
        file.unlink()
    gone.rmdir()
    assert re.match("1 pairs made in data/train, 0 in data/val, 5 ", prepare("photos", "photos"))
    assert pixels(tmp_path / "data") == before, "the same seed and name give the same blur"
    assert "0 pairs made in data/train, 0 in data/val, 6 " in prepare("photos", "photos", "--seed", 5)
    assert pixels(tmp_path / "data") == before, "whatever is asked for"


def test_a_photo_stays_on_its_side_when_others_are_added(prepare, tmp_path):
    save_photos(tmp_path, 4)
    prepare("photos", "photos")
    before = {part: set(names(tmp_path / "data" / part)) for part in ("train", "val")}
    save_photos(tmp_path, 30, start=4)
    assert "24 pairs made in data/train, 2 in data/val, 4 " in prepare("photos", "photos", "--seed", 3)
    assert all(before[part] <= set(names(tmp_path / "data" / part)) for part in before)
    prepare("photos", "photos", "--copies", 2)
    sides = [{n.partition(".")[0] for n in names(tmp_path / "data" / part)} for part in ("train", "val")]
    assert not sides[0] & sides[1]


def test_what_cannot_be_used_is_left_out_and_named(prepare, tmp_path):
    save_photos(tmp_path, 4)
    save(tmp_path / "photos" / "tiny.png", height=20)
    save(tmp_path / "photos" / "0.jpg")
    (tmp_path / "photos" / "text.png").write_text("no picture")
    augment = (tmp_path / "photos" / "3.png").read_bytes()
    (tmp_path / "photos" / "cut.png").write_bytes(augment[: len(augment) // 2])
    out = prepare("photos", "photos")
    assert "4 skipped" in out and prepare.code == 1
    twin = "0.png would be stored as 0, like photos/0.jpg"
    for said in "tiny.png is 136x20, smaller", twin, "text.png cannot", "cut.png cannot":
        assert said in out, said
    assert len(names(tmp_path / "data/train")) + len(names(tmp_path / "data/val")) == 4


def test_files_that_are_no_photos_are_named(prepare, tmp_path):
    for folder in "soft", "sharp":
        for name in "1.png", "2.png":
            save(tmp_path / folder / name)
        (tmp_path / folder / "3.nef").touch()
    assert "1 other files in soft are left out: 1 .nef" in prepare("photos", "soft", "--out", "one")
    assert "1 other files in sharp are left out: 1 .nef" in prepare("pairs", "soft", "sharp", "--out", "two")


def test_pairs_are_matched_by_name_and_keep_their_pixels(prepare, tmp_path):
    for k in range(5):
        save(tmp_path / "soft" / f"{k}.png", seed=k)
        save(tmp_path / "sharp" / f"{k}.png", seed=k + 50)
    save(tmp_path / "soft" / "alone.png")
    save(tmp_path / "sharp" / "other.jpg")
    save(tmp_path / "soft" / "odd.png")
    save(tmp_path / "sharp" / "odd.png", width=140)
    save(tmp_path / "soft" / "4.jpg", seed=4)
    out = prepare("pairs", "soft", "sharp")
    assert "4 skipped" in out
    for said in (
        "alone.png has no counterpart in sharp",
        "other.jpg has no counterpart in soft",
        "odd.png is 136x128, sharp/odd.png is 140x128",
        "soft/4.png has the same name as soft/4.jpg",
    ):
        assert said in out, said
    for folder in (tmp_path / "data").glob("*/[0-3]"):
        for name, source in ("blurry", "soft"), ("sharp", "sharp"):
            assert np.array_equal(read_photo(folder / f"{name}.png"), read_photo(tmp_path / source / f"{folder.name}.png"))
    assert len(list((tmp_path / "data").glob("*/[0-3]"))) == 4


def test_pairs_in_one_folder_are_not_matched_with_themselves(prepare, tmp_path):
    for name in "0001_blur", "0001_sharp", "0002_blur", "0002_sharp":
        save(tmp_path / "both" / f"{name}.png")
    said = prepare("pairs", "both", "./both/")
    assert "both and both are the same folder: move the sharp photos to another one" in said and "\n" not in said
    assert not list((tmp_path / "data").glob("*/*"))


def test_frames_of_one_folder_are_one_sequence(prepare, tmp_path):
    for sequence in "abc":
        for k in range(3):
            save(tmp_path / "soft" / sequence / f"{k}.png", seed=k)
            save(tmp_path / "sharp" / sequence / f"{k}.png", seed=k)
    assert "6 pairs made in data/train, 3 in data/val" in prepare("pairs", "soft", "sharp", "--val-share", 0.3)
    assert len({name.partition(".")[0] for name in names(tmp_path / "data/val")}) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("photos", "nowhere"), "nowhere is not a folder"),
        (("photos", "one"), "nothing is left for data/val: at least two photos or sequences are needed"),
        (("photos", "ours"), "ours contains pairs, such as ours/1: give a folder of single photos"),
        (("photos", "one", "two"), "unrecognized arguments: two"),
        (("pairs", "one"), "the following arguments are required: FOLDER"),
        (("photos", "one", "--val-share", 1.1), "--val-share: 1.1 must be a number from 0 to 1"),
        (("photos", "one", "--copies", 0), "--copies: 0 is not a whole number from 1"),
        (("photos", "one", "--tile", 20), "--tile: 20 is not a whole number from 128"),
        (("blurry", "one", "--val-share", 0.5), "unrecognized arguments: --val-share"),
        (("gopro", "one", "--copies", 2), "unrecognized arguments: --copies"),
        (("photos", "one", "--out", "one/1.png"), "one/1.png is not a folder"),
    ],
)
def test_a_mistake_is_one_sentence(prepare, tmp_path, arguments, said):
    for name in "one/1", "ours/1/blurry", "ours/1/sharp":
        save(tmp_path / f"{name}.png")
    error = prepare(*arguments)
    assert error.startswith("error: ") and said in error and "\n" not in error


@pytest.mark.parametrize(
    ("constant", "value", "said"),
    [
        ("VAL_SHARE", "few", "--val-share: few must be a number from 0 to 1"),
        ("COPIES", 0, "--copies: 0 is not a whole number from 1 to"),
        ("TILE", 20, "--tile: 20 is not a whole number from 128 to"),
        ("LONGEST", 1e3, "--longest: 1000.0 is not a whole number from 128"),
        ("SEED", None, "--seed: None is not a whole number from 0"),
        ("SMALLEST", 0, "SMALLEST = 0 is not a whole number from 1"),
        ("MARGIN", -4, "MARGIN = -4 is not a whole number from 0"),
        ("OUT", None, "OUT = None is not a path: set it to one in quotes"),
        ("OUT", "~/pairs", "--out ~/pairs starts with ~, which only a shell replaces"),
    ],
)
def test_a_constant_out_of_range_is_one_sentence(prepare, tmp_path, monkeypatch, constant, value, said):
    save_photos(tmp_path, 2)
    monkeypatch.setattr(prepare_data, constant, value)
    error = prepare("photos", "photos")
    assert error.startswith("error: ") and said in error and "\n" not in error and names(tmp_path) == ["photos"]


def test_a_pair_is_written_whole_or_not_at_all(prepare, tmp_path, monkeypatch):
    save_photos(tmp_path, 3)
    save_picture, calls = Image.Image.save, []

    def fails_at_the_fourth(picture, file, *args, **kwargs):
        calls.extend([] if isinstance(file, io.BytesIO) else [1])  # a JPEG that degrades a photo is in memory
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        save_picture(picture, file, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", fails_at_the_fourth)
    assert re.search("cannot be written .*No space left", prepare("photos", "photos"))
    assert all(len(list(folder.iterdir())) == 3 for folder in (tmp_path / "data").glob("*/*")), "and none is hidden"
    monkeypatch.setattr(Image.Image, "save", save_picture)
    prepare("photos", "photos")
    assert len(pixels(tmp_path / "data")) == 6


@pytest.mark.parametrize("suffix", ["jpg", "tif", "png"])
def test_photos_that_exif_turns_are_made_upright(prepare, tmp_path, suffix):
    exif = Image.Exif()
    exif[274] = 6  # Orientation: to be turned by a quarter
    (tmp_path / "photos").mkdir()
    for k in range(2):
        Image.fromarray(dummy_photo(140, 300, seed=k)).save(tmp_path / "photos" / f"{k}.{suffix}", exif=exif)
    prepare("photos", "photos", "--tile", 150)
    assert {read_photo(path).shape for path in (tmp_path / "data").rglob("*.png")} == {(150, 140, 3)}


def test_our_own_pairs_are_not_taken_for_photos(prepare, tmp_path):
    for k in range(3):
        save(tmp_path / f"{k}.png", seed=k)
    prepare("photos", ".")
    assert "0 pairs made in data/train, 0 in data/val, 3 " in prepare("photos", ".")


def test_photos_where_pairs_are_put_are_named_and_not_passed_over(prepare, tmp_path):
    for k in range(3):
        save(tmp_path / "data" / f"{k}.png", seed=k)
    prepare("photos", "data")
    save(tmp_path / "data/train/mine.png")
    save(tmp_path / "data/val/holiday/1.png")
    out = prepare("photos", "data")
    assert out.startswith("error: 2 problems") and "data/train/mine.png is where pairs are put: move it to a folder" in out
    assert "data/val/holiday/1.png is where" in out and prepare.code == 1


def test_a_single_sub_folder_is_one_sequence_too(prepare, tmp_path):
    for k in range(8):
        save(tmp_path / ("soft", "sharp")[k % 2] / "clip" / f"{k // 2}.png", seed=k // 2)
    assert "two photos or sequences are needed" in prepare("pairs", "soft", "sharp")
    for folder in "soft", "sharp":
        save(tmp_path / folder / "other.png")
    prepare("pairs", "soft", "sharp")
    parts = (names(tmp_path / "data" / part) for part in ("train", "val"))
    assert sorted(parts) == [["clip.0", "clip.1", "clip.2", "clip.3"], ["other"]]


def test_another_photo_of_the_same_name_is_said(prepare, tmp_path):
    for folder, shift in ("a", 0), ("b", 5):
        for k in range(3):
            save(tmp_path / folder / f"{k}.png", seed=k + shift, width=136 + shift)
    prepare("photos", "a")
    before = pixels(tmp_path / "data")
    out = prepare("photos", "b")
    assert "3 skipped" in out and "b/2.png would be stored as 2, like another photo: rename it" in out
    assert pixels(tmp_path / "data") == before


def test_too_long_a_name_is_said_and_the_rest_is_made(prepare, tmp_path):
    save_photos(tmp_path, 2)
    long = "photos/" + "deep/" * 60 + "3.png"
    save(tmp_path / long)
    out = prepare("photos", "photos")
    assert "1 skipped" in out and f"{long} has too long a name" in out and prepare.code == 1
    assert len(names(tmp_path / "data/train")) + len(names(tmp_path / "data/val")) == 2
    save(tmp_path / "photos" / f"{'n' * (prepare_data.LONGEST_NAME - len('.png'))}.png")
    assert "1 pairs made" in prepare("photos", "photos")
