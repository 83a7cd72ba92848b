import io
import struct

import numpy as np
import pytest
import skimage.io
import tifffile
from example_pictures import picture_of, same, values
from PIL import Image, PngImagePlugin, TiffImagePlugin

from images.photos import read_photo, upright_size
from images.pictures import Picture, read_picture, write_picture
from utils import UserError


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
    with pytest.raises(UserError, match="its alpha is premultiplied"):
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
    assert upright_size(tmp_path / f"a.{suffix}") == (21, 34)
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
    tifffile.imwrite(tmp_path / "signed.tif", np.zeros((9, 9), np.int8), photometric="minisblack")
    for name, said in {
        "fax.png": "black and white",
        "signed.tif": "signed",
        "float.tif": "mode F",
        "lab.tif": "mode LAB",
        "planes.tif": "separate planes",
    }.items():
        with pytest.raises(UserError, match=f"{name} .*{said}"):
            read_picture(tmp_path / name)


def test_a_wide_color_space_is_kept_in_png_and_else_told(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add(b"cICP", bytes([9, 16, 0, 1]))
    Image.new("RGB", (9, 9)).save(tmp_path / "hdr.png", pnginfo=info)
    write_picture(tmp_path / "again.png", read_picture(tmp_path / "hdr.png"))
    assert b"cICP\x09\x10\0\1" in (tmp_path / "again.png").read_bytes()
    picture = read_picture(tmp_path / "hdr.png")
    assert "without its color space, which JPEG cannot hold" in write_picture(tmp_path / "again.jpg", picture)
    Image.new("RGB", (9, 9)).save(tmp_path / "a.avif")
    content = (tmp_path / "a.avif").read_bytes()
    place = content.index(b"colrnclx") + 8
    for primaries, transfer, notes in (1, 13, []), (9, 16, ["without its color space"]):
        (tmp_path / "a.avif").write_bytes(content[:place] + bytes([0, primaries, 0, transfer]) + content[place + 4 :])
        assert read_picture(tmp_path / "a.avif").notes == notes


def test_what_is_rounded_or_lost_is_told(tmp_path):
    (tmp_path / "deep.ppm").write_bytes(b"P6\n# a comment\n3 2\n65535\n" + bytes(range(36)))
    (tmp_path / "deep2.ppm").write_bytes(b"P6 3 # a\n2\n# b\n65535\n" + bytes(range(36)))
    (tmp_path / "plain.ppm").write_bytes(b"P6\n3 2\n255\n" + bytes(range(18)))
    place = TiffImagePlugin.ImageFileDirectory_v2()
    place[33550] = (1.0, 1.0, 0.0)
    Image.new("RGB", (9, 9)).save(tmp_path / "map.tif", tiffinfo=place)
    Image.new("RGB", (9, 9)).save(
        tmp_path / "signed.jpg", extra=b"\xff\xeb\0\x22JP\0\1\0\0\0\1\0\0\0\x18jumb\0\0\0\x10jumdc2pa" + bytes(4)
    )
    notes = {"deep.ppm": ["8 instead of more bits per color"], "deep2.ppm": ["8 instead of more bits per color"]}
    notes |= {"plain.ppm": [], "map.tif": ["without its map coordinates"], "signed.jpg": ["without its content credentials"]}
    assert {name: read_picture(tmp_path / name).notes for name in notes} == notes


def test_channels_and_the_shape_of_pixels_that_are_lost_are_told(tmp_path):
    tifffile.imwrite(tmp_path / "five.tif", values(5, np.uint8), photometric="rgb", extrasamples=["unassalpha", 0])
    tifffile.imwrite(tmp_path / "four.tif", values(4, np.uint16), photometric="rgb", extrasamples=[0])
    photo = Image.fromarray(values(3, np.uint8))
    photo.save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    for name, sizes in ("wide.png", (1, 2)), ("square.png", (2, 2)):
        PngImagePlugin.putchunk(chunk := io.BytesIO(), b"pHYs", struct.pack(">IIB", *sizes, 0))
        (tmp_path / name).write_bytes(content[:33] + chunk.getvalue() + content[33:])
    photo.save(tmp_path / "square.jpg")
    content = (tmp_path / "square.jpg").read_bytes()
    (tmp_path / "wide.jpg").write_bytes(content[:13] + struct.pack(">BHH", 0, 1, 2) + content[18:])
    channels, shape = ["without its extra channels"], ["without the shape of its pixels"]
    notes = {"five.tif": channels, "four.tif": channels, "wide.png": shape, "wide.jpg": shape}
    notes |= {"square.png": [], "square.jpg": []}
    assert {name: read_picture(tmp_path / name).notes for name in notes} == notes


def test_gray_of_12_bits_becomes_as_bright_in_16(tmp_path):
    wanted = values(1, np.uint16)[..., 0] >> 4  # (21, 34): two pixels in three bytes
    first, second = wanted[:, ::2], wanted[:, 1::2]
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=-1).astype(np.uint8)
    Image.fromarray(packed.reshape(21, 51)).save(tmp_path / "a.tif")
    data = bytearray((tmp_path / "a.tif").read_bytes())
    start = struct.unpack_from("<I", data, 4)[0]
    for entry in range(start + 2, start + 2 + 12 * struct.unpack_from("<H", data, start)[0], 12):
        tag = struct.unpack_from("<H", data, entry)[0]
        if tag in (256, 258):
            struct.pack_into("<HI", data, entry + 2, 4, 1)
            struct.pack_into("<I", data, entry + 8, {256: 34, 258: 12}[tag])
    (tmp_path / "a.tif").write_bytes(data)
    assert np.array_equal(read_picture(tmp_path / "a.tif").pixels[..., 0], np.rint(wanted * (65535 / 4095)))
    assert np.array_equal(read_photo(tmp_path / "a.tif")[..., 1], np.rint(wanted * (255 / 4095)))


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
        with pytest.raises(UserError, match=f"{name}.png cannot be read as an image .*: convert, replace or remove it"):
            read_picture(tmp_path / f"{name}.png")
    with pytest.raises(UserError, match="nowhere.png is missing"):
        read_picture(tmp_path / "nowhere.png")
