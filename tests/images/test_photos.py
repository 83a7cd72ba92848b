import contextlib
import os
import struct
import zlib

import numpy as np
import pytest
import tifffile
from conftest import dummy_photo
from PIL import Image

from images.photos import DecodedPhotos, find_photos, open_image, read_photo
from utils import UserError

GREY = np.arange(0, 240, dtype=np.uint8).reshape(12, 20)
RGB = dummy_photo(12, 20, seed=1)


def test_grey_and_palette_and_alpha_and_16_bit_read_as_rgb(tmp_path):
    alpha = np.dstack([RGB, GREY])
    pictures = {
        "rgb": (Image.fromarray(RGB), RGB),
        "grey": (Image.fromarray(GREY), np.dstack([GREY] * 3)),
        "alpha": (Image.fromarray(alpha), RGB),
        "grey_alpha": (Image.fromarray(np.dstack([GREY, GREY])), np.dstack([GREY] * 3)),
        "grey_16": (Image.fromarray(GREY.astype(np.uint16) * 257), np.dstack([GREY] * 3)),
        "one_bit": (Image.fromarray(GREY > 100), np.dstack([(GREY > 100) * np.uint8(255)] * 3)),
    }
    few_colours = RGB // 128 * 255
    pictures["palette"] = Image.fromarray(few_colours).quantize(8), few_colours
    for name, (picture, expected) in pictures.items():
        picture.save(tmp_path / f"{name}.png")
        np.testing.assert_array_equal(read_photo(tmp_path / f"{name}.png"), expected, err_msg=name)


@pytest.mark.parametrize("orientation, turn", [(3, lambda a: a[::-1, ::-1]), (6, lambda a: np.rot90(a, -1)), (8, np.rot90)])
def test_exif_orientation_is_applied(tmp_path, orientation, turn):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(RGB).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_photo(tmp_path / "a.png"), turn(RGB))


def test_an_unreadable_photo_is_one_sentence_that_names_it(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:90])
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no picture")
    for name in "cut", "empty", "text":
        with pytest.raises(UserError, match=f"{name}.png cannot be read as an image") as caught:
            read_photo(tmp_path / f"{name}.png")
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="nothing.png is missing"):
        read_photo(tmp_path / "nothing.png")


def test_photos_are_found_in_sub_folders_in_order_and_hidden_ones_are_not(tmp_path):
    for name in "b.png", "a/c.JPG", "a/.hidden.png", ".cache/d.png":
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(RGB).save(tmp_path / name)
    (tmp_path / "notes.txt").touch()
    assert find_photos(tmp_path) == [tmp_path / "a/c.JPG", tmp_path / "b.png"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty contains no photos"):
        find_photos(tmp_path / "empty")
    with pytest.raises(UserError, match="elsewhere is not a folder"):
        find_photos(tmp_path / "elsewhere")


def test_linked_folders_are_followed_once_and_those_of_the_system_never(tmp_path, capsys):
    for name in "in/a.png", "in/@eaDir/a.png/thumb.jpg", "in/$RECYCLE.BIN/b.png", "far/c.jfif", "far/d.HEIC", "in/e.nef":
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    (tmp_path / "in/link").symlink_to(tmp_path / "far")
    (tmp_path / "far/back").symlink_to(tmp_path / "in")
    found = [str(path.relative_to(tmp_path / "in")) for path in find_photos(tmp_path / "in")]
    assert found == ["a.png", "link/c.jfif", "link/d.HEIC"] and "1 other files" in capsys.readouterr().out


def test_a_sub_folder_that_cannot_be_listed_is_one_sentence_beside_the_rest(tmp_path, monkeypatch):
    for name in "a.png", "locked/b.png":
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    scan = os.scandir

    def refuse(path):  # root may list everything
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    problems = []
    assert find_photos(tmp_path, problems=problems) == [tmp_path / "a.png"]
    assert len(problems) == 1 and "locked cannot be listed (Permission denied)" in problems[0]
    with pytest.raises(UserError, match="locked cannot be listed"):
        find_photos(tmp_path)


def test_photos_of_200_megapixels_are_no_bombs_and_those_of_900_are(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    header = bytearray((tmp_path / "a.png").read_bytes())
    refused = pytest.raises(UserError, match="decompression bomb")
    for size, outcome in ((16320, 12240), contextlib.nullcontext()), ((30000, 30000), refused):
        struct.pack_into(">II", header, 16, *size)
        struct.pack_into(">I", header, 29, zlib.crc32(header[12:29]))
        (tmp_path / "a.png").write_bytes(header)
        with outcome, open_image(tmp_path / "a.png") as image:
            assert image.size == size


def photos_in(folder):
    paths = []
    for k in range(3):
        paths.append(folder / f"{k}.png")
        Image.fromarray(dummy_photo(10 + k, 20 - k, seed=k)).save(paths[-1])
    return paths


def test_decoded_photos_equal_the_files(tmp_path):
    paths = photos_in(tmp_path)
    decoded = DecodedPhotos(paths, tmp_path / "cache")
    assert decoded.shapes == [(10, 20), (11, 19), (12, 18)]
    for path, pixels in zip(paths, decoded, strict=True):
        np.testing.assert_array_equal(pixels, read_photo(path))


def test_photos_are_decoded_once_until_one_is_changed_added_or_removed(tmp_path, monkeypatch):
    paths = photos_in(tmp_path)
    opened = []
    monkeypatch.setattr("images.photos.read_photo", lambda path: opened.append(path) or read_photo(path))
    DecodedPhotos(paths, tmp_path / "cache")
    DecodedPhotos(paths, tmp_path / "cache")
    assert len(opened) == 3
    Image.fromarray(dummy_photo(9, 9, seed=9)).save(paths[1])
    assert DecodedPhotos(paths, tmp_path / "cache").shapes[1] == (9, 9)
    assert DecodedPhotos(paths[:2], tmp_path / "cache").shapes == [(10, 20), (9, 9)]
    assert len(list((tmp_path / "cache").iterdir())) == 2  # the pixels and index of earlier states are gone


def test_the_key_depends_on_what_the_photos_show_alone(tmp_path):
    keys = []
    for folder in "a", "b":
        (tmp_path / folder).mkdir()
        keys.append(DecodedPhotos(photos_in(tmp_path / folder), tmp_path / folder / "cache").key)
    for path in photos_in(tmp_path / "a"):
        os.utime(path, (1, 1))
    keys.append(DecodedPhotos(photos_in(tmp_path / "a"), tmp_path / "a" / "cache").key)
    assert len(set(keys)) == 1
    Image.fromarray(dummy_photo(10, 20, seed=7)).save(tmp_path / "a" / "0.png")
    assert DecodedPhotos(sorted((tmp_path / "a").glob("*.png")), tmp_path / "a" / "cache").key not in keys


def test_a_moved_folder_stays_decoded(tmp_path, monkeypatch):
    (tmp_path / "old").mkdir()
    decoded = DecodedPhotos(photos_in(tmp_path / "old"), tmp_path / "old" / "cache")
    (tmp_path / "old").rename(tmp_path / "new")
    monkeypatch.delattr("images.photos.read_photo")
    assert DecodedPhotos(sorted((tmp_path / "new").glob("*.png")), tmp_path / "new" / "cache").key == decoded.key


def test_photos_may_be_on_another_drive_than_their_cache(tmp_path, monkeypatch):
    def refuse(path, start):  # as on Windows
        raise ValueError("path is on mount 'D:', start on mount 'C:'")

    monkeypatch.setattr(os.path, "relpath", refuse)
    assert len(DecodedPhotos(photos_in(tmp_path), tmp_path / "cache")) == 3


def test_a_complete_cache_in_a_folder_that_cannot_be_written_to_is_used(tmp_path, monkeypatch, capsys):
    paths = photos_in(tmp_path)
    DecodedPhotos(paths, tmp_path / "cache")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    monkeypatch.delattr("images.photos.read_photo")
    assert DecodedPhotos(paths, tmp_path / "cache").cache == tmp_path / "cache" and not capsys.readouterr().out


def test_all_unreadable_photos_are_named_and_nothing_is_kept(tmp_path):
    paths = photos_in(tmp_path)
    paths[0].write_text("no picture")
    paths[1].unlink()
    paths[2].write_bytes(paths[2].read_bytes()[:60])
    with pytest.raises(UserError, match=r"(?s)3 problems.*0\.png cannot be read.*1\.png is missing.*2\.png cannot be read"):
        DecodedPhotos(paths, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_an_unwritable_cache_is_replaced_by_a_temporary_one(tmp_path, capsys):
    (tmp_path / "file").touch()
    decoded = DecodedPhotos(photos_in(tmp_path), tmp_path / "file" / "cache")
    assert decoded[2].shape == (12, 18, 3)
    assert "cannot be written to" in capsys.readouterr().out


@pytest.mark.parametrize("by_seeking", [False, True])
def test_a_crop_is_the_part_of_the_photo(tmp_path, monkeypatch, by_seeking):
    if by_seeking:  # as on Windows
        monkeypatch.delattr(os, "pread")
    paths = photos_in(tmp_path)
    decoded = DecodedPhotos(paths, tmp_path / "cache")
    for index, path in enumerate(paths):
        np.testing.assert_array_equal(decoded.crop(index, slice(2, 9), slice(3, 17)), read_photo(path)[2:9, 3:17])


def test_pixels_that_are_cut_off_while_in_use_are_one_sentence(tmp_path):
    decoded = DecodedPhotos(photos_in(tmp_path), tmp_path / "cache")
    assert decoded[2].shape == (12, 18, 3)
    os.truncate(decoded.file, 1300)
    assert decoded[0].shape == (10, 20, 3)
    with pytest.raises(UserError, match="was removed or truncated while in use"):
        decoded[2]


def test_what_may_not_be_looked_at_does_not_stop_the_rest(tmp_path, monkeypatch):
    for name in "a.png", "locked/b.png":
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    stat = os.stat

    def refuse(path, **options):  # as in a folder without the permission to enter it; root may everything
        if "locked" in str(path) and str(path).endswith("b.png"):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", refuse)
    assert find_photos(tmp_path) == [tmp_path / "a.png", tmp_path / "locked/b.png"]


def test_16_bit_gray_with_zero_for_white_is_no_negative(tmp_path):
    gray = np.arange(600, dtype=np.uint16).reshape(20, 30) * 100
    tifffile.imwrite(tmp_path / "a.tif", 65535 - gray, photometric="miniswhite")
    assert np.array_equal(read_photo(tmp_path / "a.tif")[..., 0], np.round(gray / 257))
