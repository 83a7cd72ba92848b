import io
import struct
import sys

import numpy as np
import pytest
import skimage.io
import tifffile
from PIL import Image, ImageCms, PngImagePlugin, TiffImagePlugin

from images.layouts import upright_size
from images.photos import read_photo
from images.pictures import Picture, read_picture, write_picture
from prepare_data import is_plain_png
from utils import UserError


def values(channels, dtype, height=21, width=34):
    rng = np.random.default_rng(channels)
    smooth = np.add.outer(np.arange(height), np.arange(width))[..., None] * rng.uniform(1, 3, channels) * 1.01
    scale = np.iinfo(dtype).max / 255
    return (smooth * scale + rng.integers(0, 5, smooth.shape)).clip(0, np.iinfo(dtype).max).astype(dtype)


def picture_of(channels, dtype):
    all_values = values(channels, dtype)
    colours = channels - (channels % 2 == 0)
    return Picture(all_values[..., :colours], all_values[..., colours:] if colours < channels else None)


def same(a, b):
    alphas = (a.alpha is None) == (b.alpha is None) and (a.alpha is None or np.array_equal(a.alpha, b.alpha))
    return a.pixels.dtype == b.pixels.dtype and np.array_equal(a.pixels, b.pixels) and alphas


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp", "webp", "jpg"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_8_bits_come_back_in_every_format_that_holds_them(tmp_path, suffix, channels):
    path, picture = tmp_path / f"a.{suffix}", picture_of(channels, np.uint8)
    if suffix in ("jpg", "bmp") and channels in (2, 4):
        with pytest.raises(UserError, match="has no transparency, choose a name that ends in .png"):
            write_picture(path, picture)
        assert not any(tmp_path.iterdir())
        return
    write_picture(path, picture)
    again = read_picture(path)
    if suffix in ("png", "tif", "bmp"):
        assert same(picture, again)
    else:
        difference = again.pixels.astype(int) - picture.pixels
        assert again.pixels.shape[:2] == (21, 34) and np.abs(difference).mean() < 6
    assert (again.alpha is None) == (picture.alpha is None)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_16_bits_come_back_to_the_last_one(tmp_path, suffix, channels):
    path, picture = tmp_path / f"a.{suffix}", picture_of(channels, np.uint16)
    write_picture(path, picture)
    assert same(picture, read_picture(path))
    with Image.open(path) as seen_by_pillow:
        seen_by_pillow.load()
        assert seen_by_pillow.size == (34, 21)


def test_16_bit_pngs_of_many_rows_are_right_across_the_blocks_they_are_packed_in(tmp_path):
    picture = Picture(values(3, np.uint16, height=600, width=7))
    write_picture(tmp_path / "tall.png", picture)
    assert same(picture, read_picture(tmp_path / "tall.png"))


def test_16_bits_do_not_go_into_a_format_of_8(tmp_path):
    for suffix in "jpg", "webp", "bmp":
        with pytest.raises(UserError, match="has no 16 bits"):
            write_picture(tmp_path / f"a.{suffix}", picture_of(3, np.uint16))


def test_16_bit_tiffs_of_other_programs_are_read(tmp_path):
    wanted = values(3, np.uint16)
    skimage.io.imsave(tmp_path / "a.tif", wanted, check_contrast=False)
    tifffile.imwrite(tmp_path / "b.tif", wanted, photometric="rgb", compression="zlib", predictor=True)
    for name in "a.tif", "b.tif":
        assert np.array_equal(read_picture(tmp_path / name).pixels, wanted)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_exif_and_colour_profile_are_kept_and_a_turned_photo_looks_the_same(tmp_path, suffix):
    exif = Image.Exif()
    exif[274], exif[271] = 6, "a camera"  # Orientation: to be turned by a quarter
    exif[0x8769] = {33434: 0.01}  # ExposureTime
    image = Image.fromarray(values(3, np.uint8))
    image.save(tmp_path / f"a.{suffix}", exif=exif.tobytes(), icc_profile=b"a profile", dpi=(300, 300))
    write_picture(tmp_path / f"b.{suffix}", read_picture(tmp_path / f"a.{suffix}"))
    with Image.open(tmp_path / f"b.{suffix}") as again:
        found = again.getexif()
        assert again.info["icc_profile"] == b"a profile" and found[271] == "a camera"
        assert float(found.get_ifd(0x8769)[33434]) == pytest.approx(0.01)
    before, after = (read_photo(tmp_path / f"{name}.{suffix}").astype(int) for name in "ab")
    assert before.shape == after.shape == (34, 21, 3)
    assert np.abs(before - after).mean() < (4 if suffix in ("jpg", "webp") else 1e-9)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_a_16_bit_picture_keeps_how_it_is_turned_and_its_profile(tmp_path, suffix):
    exif = Image.Exif()
    exif[274] = 8
    picture = picture_of(3, np.uint16)
    picture.exif, picture.options = exif.tobytes(), {"icc_profile": b"a profile"}
    write_picture(tmp_path / f"a.{suffix}", picture)
    again = read_picture(tmp_path / f"a.{suffix}")
    assert again.options["icc_profile"] == b"a profile"
    if suffix == "tif":  # Pillow turns the pixels instead
        assert again.exif is None and np.array_equal(again.pixels, np.rot90(picture.pixels))
        return
    found = Image.Exif()
    found.load(again.exif)
    assert found[274] == 8


@pytest.mark.parametrize("kind", [(1, np.uint8), (1, np.uint16), (3, np.uint8), (4, np.uint8), (3, np.uint16)])
@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_a_turned_tiff_is_turned_once_whatever_it_holds(tmp_path, kind, orientation):
    channels, dtype = kind
    turned = values(channels, dtype)
    if channels == 3 and dtype == np.uint16:
        tifffile.imwrite(tmp_path / "a.tif", turned, photometric="rgb", extratags=[(274, "H", 1, orientation, True)])
    else:
        image = Image.fromarray(turned if channels > 1 else turned[..., 0])
        image.save(tmp_path / "a.tif", tiffinfo={274: orientation})
    upright = np.rot90(turned, {3: 2, 6: 3, 8: 1}[orientation])
    write_picture(tmp_path / "b.tif", read_picture(tmp_path / "a.tif"))
    for name in "ab":
        seen = read_photo(tmp_path / f"{name}.tif").astype(int)
        wanted = upright[..., :3] if dtype == np.uint8 else np.round(upright / 257)
        assert seen.shape[:2] == upright.shape[:2] and np.abs(seen - wanted).max() <= 1, name


def test_exif_of_webp_is_kept_in_a_jpeg(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(values(3, np.uint8)).save(tmp_path / "a.webp", exif=exif.tobytes())
    write_picture(tmp_path / "b.jpg", read_picture(tmp_path / "a.webp"))
    assert read_photo(tmp_path / "b.jpg").shape == (34, 21, 3)


def test_a_fourth_channel_that_is_no_plain_alpha_is_not_taken_for_it(tmp_path):
    for name, extra in ("multiplied", "assocalpha"), ("other", "unspecified"), ("plain", "unassalpha"):
        tifffile.imwrite(tmp_path / f"{name}.tif", values(4, np.uint16), photometric="rgb", extrasamples=[extra])
    with pytest.raises(UserError, match="premultiplied alpha"):
        read_picture(tmp_path / "multiplied.tif")
    assert read_picture(tmp_path / "other.tif").alpha is None
    assert read_picture(tmp_path / "plain.tif").alpha.dtype == np.uint16


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_damaged_exif_is_left_out_and_the_pixels_are_read(tmp_path, suffix):
    pixels = values(3, np.uint8)
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}", exif=b"Exif\0\0garbagegarbage")
    picture = read_picture(tmp_path / f"a.{suffix}")
    assert picture.exif is None and picture.notes == ["without its EXIF, which is damaged"]
    assert np.array_equal(picture.pixels, read_photo(tmp_path / f"a.{suffix}"))
    assert upright_size(tmp_path / f"a.{suffix}") == (21, 34) and is_plain_png(tmp_path / f"a.{suffix}") == (suffix == "png")
    with pytest.raises(UserError, match="b.tif cannot be written as TIFF"):
        write_picture(tmp_path / "b.tif", Picture(values(3, np.uint16), exif=b"Exif\0\0garbagegarbage"))


def test_a_palette_becomes_colours_and_keeps_what_is_transparent(tmp_path):
    image = Image.fromarray(values(3, np.uint8)).quantize(16)
    image.save(tmp_path / "opaque.png")
    image.save(tmp_path / "clear.png", transparency=3)
    opaque, clear = (read_picture(tmp_path / f"{name}.png") for name in ("opaque", "clear"))
    assert opaque.alpha is None and np.array_equal(opaque.pixels, np.asarray(image.convert("RGB")))
    assert np.array_equal(clear.alpha[..., 0] == 0, np.asarray(image) == 3)


def test_what_cannot_be_kept_as_it_is_is_refused(tmp_path):
    photo = Image.fromarray(values(3, np.uint8))
    photo.convert("1").save(tmp_path / "fax.png")
    photo.convert("F").save(tmp_path / "float.tif")
    photo.convert("LAB").save(tmp_path / "lab.tif")
    tifffile.imwrite(tmp_path / "planes.tif", np.zeros((3, 9, 9), np.uint16), photometric="rgb", planarconfig="separate")
    for name, said in {
        "fax.png": "black and white",
        "float.tif": "floating-point",
        "lab.tif": "color mode LAB",
        "planes.tif": "separate planes",
    }.items():
        with pytest.raises(UserError, match=f"{name} .*{said}"):
            read_picture(tmp_path / name)


def test_what_an_encoder_refuses_is_one_sentence_and_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="long.webp cannot be written as WEBP .*: choose a name that ends in .png"):
        write_picture(tmp_path / "long.webp", Picture(np.zeros((1, 20000, 3), np.uint8)))
    huge = Picture(np.zeros((4, 4, 3), np.uint8), exif=b"Exif\0\0" + bytes(70000))
    with pytest.raises(UserError, match="exif.jpg cannot be written as JPEG"):
        write_picture(tmp_path / "exif.jpg", huge)
    assert not any(tmp_path.iterdir())


def test_a_file_that_is_no_whole_picture_is_one_sentence(tmp_path):
    write_picture(tmp_path / "whole.png", picture_of(3, np.uint16))
    whole = (tmp_path / "whole.png").read_bytes()
    for name, content in {"cut": whole[:700], "empty": b"", "text": b"not a picture"}.items():
        (tmp_path / f"{name}.png").write_bytes(content)
        with pytest.raises(UserError, match=f"{name}.png cannot be read as an image .*replace or remove it"):
            read_picture(tmp_path / f"{name}.png")
    with pytest.raises(UserError, match="nowhere.png is missing"):
        read_picture(tmp_path / "nowhere.png")


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


def test_lossless_webp_stays_lossless(tmp_path):
    photo = Image.fromarray(values(3, np.uint8))
    for name, options in ("a", dict(lossless=True)), ("b", dict(lossless=True, icc_profile=b"odd")), ("c", {}):
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


def test_a_damaged_description_of_a_tiff_is_left_out(tmp_path):
    wrong = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, kind, value in (282, 5, (0, 0)), (283, 5, (0, 0)), (700, 4, 5), (33723, 2, "text"), (34675, 4, 5):
        wrong.tagtype[tag], wrong[tag] = kind, TiffImagePlugin.IFDRational(*value) if kind == 5 else value
    Image.fromarray(values(3, np.uint8)).save(tmp_path / "a.tif", tiffinfo=wrong)
    picture = read_picture(tmp_path / "a.tif")
    assert not picture.options and not picture.notes
    for name in "b.png", "b.tif", "b.jpg":
        write_picture(tmp_path / name, picture)
