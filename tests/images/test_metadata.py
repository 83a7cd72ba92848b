"""What is in an image file beside plain RGB pixels: inks, descriptions, frames, more bits."""

import io
import struct
import sys

import numpy as np
import pytest
from example_pictures import picture_of, same, values
from PIL import Image, ImageCms, PngImagePlugin, TiffImagePlugin

from images.photos import read_photo, upright_size
from images.pictures import Picture, read_picture, write_picture
from utils import UserError


def test_inks_become_srgb_through_their_profile_and_without_one_too(tmp_path):
    photo = Image.fromarray(values(3, np.uint8))
    photo.convert("CMYK").save(tmp_path / "plain.jpg", quality=100)  # inverted, with Adobe's marker
    photo.convert("CMYK").save(tmp_path / "odd.jpg", quality=100, icc_profile=b"no profile")
    for name in "plain", "odd":
        picture = read_picture(tmp_path / f"{name}.jpg")
        assert picture.notes == ["converted from CMYK to RGB"] and "icc_profile" not in picture.options
        assert np.abs(picture.pixels.astype(int) - np.asarray(photo)).mean() < 4
        assert np.array_equal(picture.pixels, read_photo(tmp_path / f"{name}.jpg"))


def test_a_usable_profile_of_inks_is_used(tmp_path, monkeypatch):
    asked = []

    def convert(image, profile, *_, **__):
        asked.append(profile)
        return image.convert("RGB")

    monkeypatch.setattr(ImageCms, "profileToProfile", convert)
    Image.fromarray(values(3, np.uint8)).convert("CMYK").save(tmp_path / "a.jpg", icc_profile=b"a profile")
    read_picture(tmp_path / "a.jpg")
    assert asked[0].getvalue() == b"a profile"


KINDS = [(suffix, np.uint8) for suffix in ("jpg", "png", "webp", "tif", "avif", "heic")]
KINDS += [("png", np.uint16), ("tif", np.uint16)]
XMP, IPTC = b"<x:xmpmeta xmlns:x='adobe:ns:meta/'/>", b"\x1c\x02\x05\0\x03abc"


@pytest.mark.parametrize("suffix, dtype", KINDS)
def test_what_describes_a_photo_is_kept_or_told(tmp_path, suffix, dtype):
    if suffix == "heic":
        pytest.importorskip("pillow_heif")
    exif = Image.Exif()
    exif[271], exif[0x8769] = "a camera", {33434: 0.01}  # ExposureTime
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture = picture_of(3, dtype)
    picture.exif, picture.options = exif.tobytes(), dict(xmp=XMP, iptc=IPTC, icc_profile=profile)
    write_picture(tmp_path / f"a.{suffix}", picture)
    again = read_picture(tmp_path / f"a.{suffix}")
    found = Image.Exif()
    found.load(again.exif)
    assert found[271] == "a camera" and float(found.get_ifd(0x8769)[33434]) == pytest.approx(0.01)
    assert again.options["xmp"] == XMP and again.options["icc_profile"] == profile
    assert again.options.get("iptc") == (IPTC if suffix in ("jpg", "tif") else None)
    assert [note[:16] for note in picture.notes] == ([] if suffix in ("jpg", "tif") else ["without its IPTC"])


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_an_orientation_in_xmp_alone_does_not_turn_a_photo_as_in_viewers(tmp_path, suffix):
    xmp = XMP.replace(b"/>", b' tiff:Orientation="6"/>')
    write_picture(tmp_path / f"a.{suffix}", Picture(values(3, np.uint8), options=dict(xmp=xmp)))
    picture = read_picture(tmp_path / f"a.{suffix}")
    assert picture.exif is None and picture.options["xmp"] == xmp
    assert read_photo(tmp_path / f"a.{suffix}").shape == (21, 34, 3)
    assert upright_size(tmp_path / f"a.{suffix}") == (21, 34)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_texts_and_colours_of_a_png_are_kept(tmp_path, dtype):
    info = PngImagePlugin.PngInfo()
    info.add_text("Title", "a photo")
    info.add(b"gAMA", (45455).to_bytes(4, "big"))
    info.add(b"cHRM", np.array([31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000], ">u4").tobytes())
    picture = picture_of(3, dtype)
    picture.options = dict(pnginfo=info)
    write_picture(tmp_path / "a.png", picture)
    write_picture(tmp_path / "b.png", read_picture(tmp_path / "a.png"))
    with Image.open(tmp_path / "b.png") as again:
        assert again.text == {"Title": "a photo"} and again.info["gamma"] == 0.45455
        assert again.info["chromaticity"] == (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)


@pytest.mark.parametrize("suffix, kept", [("png", True), ("jpg", True), ("tif", True), ("webp", False), ("avif", False)])
def test_a_gray_profile_is_kept_where_gray_is(tmp_path, suffix, kept):
    profile = bytes(12) + b"mntrGRAYXYZ " + bytes(104)
    picture = Picture(values(1, np.uint8), options=dict(icc_profile=profile))
    notes = write_picture(tmp_path / f"a.{suffix}", picture)
    assert notes == ([] if kept else [f"without its color profile, which {suffix.upper()} cannot hold"])
    assert read_picture(tmp_path / f"a.{suffix}").options.get("icc_profile") == (profile if kept else None)


def test_lossless_webp_stays_lossless(tmp_path):
    photo = Image.fromarray(values(3, np.uint8))
    large = dict(lossless=True, icc_profile=b"odd" * 140_000)  # it comes before the pixels
    for name, options in ("a", dict(lossless=True)), ("b", large), ("c", {}):
        photo.save(tmp_path / f"{name}.webp", **options)
        assert read_picture(tmp_path / f"{name}.webp").options["lossless"] == (name != "c")
    write_picture(tmp_path / "d.webp", read_picture(tmp_path / "b.webp"))
    assert same(read_picture(tmp_path / "d.webp"), picture_of(3, np.uint8))


def moving(clear, count=4):
    """(count, 24, 32, 3 or 4) uint8: a square with a hole that moves, on nothing if ``clear``."""
    frames = np.zeros((count, 24, 32, 4), np.uint8)
    frames[..., 3] = 0 if clear else 255
    for k in range(count):
        frames[k, 4:16, 4 * k + 2 : 4 * k + 14] = 200, 60, 30, 255
        frames[k, 8:12, 4 * k + 6 : 4 * k + 10] = frames[k, 0, 0]
    return frames if clear else frames[..., :3]


@pytest.mark.parametrize("clear", [False, True])
@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "avif"])
def test_animations_keep_frames_times_loops_and_what_is_transparent(tmp_path, suffix, clear):
    frames, times, loop = moving(clear), [100, 250, 50, 400], 0 if clear else 3  # 0 is endless
    first, *more = map(Image.fromarray, frames)
    options = dict(duration=times, loop=loop, disposal=2, lossless=True)
    first.save(tmp_path / f"a.{suffix}", save_all=True, append_images=more, **options)
    picture = read_picture(tmp_path / f"a.{suffix}")
    assert picture.pixels.shape == (4, 24, 32, 3) and (picture.alpha is not None) == clear
    write_picture(tmp_path / f"b.{suffix}", picture)
    again = read_picture(tmp_path / f"b.{suffix}")
    assert again.options["duration"] == picture.options["duration"] == times
    assert again.options.get("loop") == (None if suffix == "avif" else loop)
    seen = frames[..., -1] > 127 if clear else slice(None)
    assert not clear or np.array_equal(again.alpha > 127, frames[..., 3:] > 127)
    assert np.abs(again.pixels[seen].astype(int) - picture.pixels[seen]).mean() < 6
    with pytest.raises(UserError, match="JPEG has no animations"):
        write_picture(tmp_path / "c.jpg", picture)


@pytest.mark.parametrize("clear", [False, True])
def test_what_stands_still_in_a_gif_does_not_flicker(tmp_path, clear):
    frames = np.repeat(values(3, np.uint8, 64, 96)[None], 4, axis=0)
    frames[:, 40:] = np.arange(0, 240, 60)[:, None, None, None] + [5, 10, 15]  # which takes colors of each palette
    alpha = np.broadcast_to(np.uint8(255 * (np.arange(96) > 9))[:, None], (4, 64, 96, 1)) if clear else None
    write_picture(tmp_path / "a.gif", Picture(frames, alpha, options=dict(save_all=True, duration=50)))
    again = read_picture(tmp_path / "a.gif")
    seen = again.pixels[:, :40, 10:].astype(int)
    assert again.pixels.shape == frames.shape and np.ptp(seen, axis=0).max() == 0
    assert np.abs(seen - frames[:, :40, 10:]).mean() < 4


def test_what_is_beside_the_picture_is_told(tmp_path):
    photo, other = (Image.fromarray(values(3, np.uint8)) for _ in range(2))
    photo.save(tmp_path / "pages.tif", save_all=True, append_images=[other])
    photo.copy().save(tmp_path / "gain.jpg", "MPO", save_all=True, append_images=[other])
    photo.copy().save(tmp_path / "layers.tif", tiffinfo={37724: b"layers"})
    photo.copy().save(tmp_path / "moves.jpg", xmp=b'<x GCamera:MotionPhoto="1" xmpNote:HasExtendedXMP="1"/>')
    for name, notes in {
        "pages.tif": ["the first of its 2 images alone"],
        "gain.jpg": ["the first of its 2 images alone"],
        "layers.tif": ["without its layers"],
        "moves.jpg": ["without a part of its XMP", "without its video"],
    }.items():
        assert read_picture(tmp_path / name).notes == notes
    picture = Picture(values(3, np.uint8), options=dict(xmp=XMP, icc_profile=b"odd"))
    write_picture(tmp_path / "a.bmp", picture)
    assert picture.notes == [f"without its {name}, which BMP cannot hold" for name in ("XMP", "color profile")]


def test_more_than_8_bits_in_heic_are_told_and_without_its_package_it_is_named(tmp_path, monkeypatch):
    heif = pytest.importorskip("pillow_heif")
    deep = values(3, np.uint16)
    heif.from_bytes("RGB;16", (34, 21), deep.tobytes()).save(tmp_path / "a.heic")
    assert read_picture(tmp_path / "a.heic").notes == ["8 instead of more bits per color"]
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    for work in read_picture, read_photo, lambda path: write_picture(path, picture_of(3, np.uint8)):
        with pytest.raises(UserError, match="a.heic is HEIC: install pillow-heif to read and write it, pip install"):
            work(tmp_path / "a.heic")


def test_16_bit_tiffs_with_lzw_are_read_without_another_package(tmp_path):
    wanted = values(3, np.uint16)
    content = io.BytesIO()  # 8 bits and twice the width, with the same bytes
    Image.fromarray(wanted.astype("<u2").view(np.uint8).reshape(21, 68, 3)).save(content, "TIFF", compression="tiff_lzw")
    data = content.getbuffer()
    first = struct.unpack_from("<I", data, 4)[0]
    for entry in range(first + 2, len(data) - 11, 12):
        tag, _, _, place = struct.unpack_from("<HHII", data, entry)
        if tag == 256:
            struct.pack_into("<I", data, entry + 8, 34)
        elif tag == 258:
            struct.pack_into("<3H", data, place, 16, 16, 16)
            break
    (tmp_path / "a.tif").write_bytes(data)
    assert np.array_equal(read_picture(tmp_path / "a.tif").pixels, wanted)


def test_texts_of_a_png_are_not_taken_for_what_pillow_calls_so(tmp_path):
    names = ["dpi", "gamma", "icc_profile", "photoshop", "srgb", "transparency", "xmp"]
    texts = PngImagePlugin.PngInfo()
    for name in names:
        texts.add_text(name, "a text")
    Image.fromarray(values(3, np.uint8)).save(tmp_path / "a.png", pnginfo=texts)
    picture = read_picture(tmp_path / "a.png")
    write_picture(tmp_path / "b.jpg", picture)
    write_picture(tmp_path / "b.png", picture)
    with Image.open(tmp_path / "b.png") as image:
        assert [name for name, text in image.text.items() if text == "a text"] == names


def test_texts_of_a_tiff_are_kept_and_a_resolution_is_not_made_up(tmp_path):
    texts = {269: "a", 285: "b", 316: "c", 18246: 4, 18249: 80} | {tag: b"d\0" for tag in range(40091, 40096)}
    Image.fromarray(values(3, np.uint8)).save(tmp_path / "a.tif", tiffinfo=texts)
    write_picture(tmp_path / "b.tif", read_picture(tmp_path / "a.tif"))
    with Image.open(tmp_path / "b.tif") as again:
        assert {tag: again.tag_v2[tag] for tag in texts} == texts and 282 not in again.tag_v2
    write_picture(tmp_path / "c.png", read_picture(tmp_path / "a.tif"))
    with Image.open(tmp_path / "c.png") as again:
        assert "dpi" not in again.info


def test_a_damaged_description_of_a_tiff_is_left_out(tmp_path):
    wrong = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, kind, value in (282, 5, (0, 0)), (283, 5, (0, 0)), (33723, 2, "text"), (34675, 4, 5):
        wrong.tagtype[tag], wrong[tag] = kind, TiffImagePlugin.IFDRational(*value) if kind == 5 else value
    Image.fromarray(values(3, np.uint8)).save(tmp_path / "a.tif", tiffinfo=wrong)
    picture = read_picture(tmp_path / "a.tif")
    assert not picture.options and not picture.notes
    for name in "b.png", "b.tif", "b.jpg":
        write_picture(tmp_path / name, picture)
