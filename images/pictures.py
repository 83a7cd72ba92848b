"""An image file -> its pixels and everything else it contains, and back: for applying a network, not for training one.

Depth (8 or 16 bits), gray, transparency, frames, EXIF, XMP, IPTC and color profile are kept. Pixels stay as stored: those of
a JPEG with an EXIF orientation are not rotated, those of a TIFF are and the tag is removed; either way it looks as before.
"""

import io
import re
import struct
import sys
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from images.files import atomic
from images.photos import FORMATS, MAX_PIXELS, cmyk_to_rgb, deep_gray, exif_of, load_heif, open_image, pixels_of
from utils import UserError

ANIMATED = ("GIF", "WEBP", "PNG", "AVIF")
TRANSPARENT = ("PNG", "TIFF", "WEBP", "GIF", "AVIF", "HEIF", "JPEG2000")
DESCRIBED = ("JPEG", "PNG", "TIFF", "WEBP", "AVIF", "HEIF")  # hold EXIF, XMP and a color profile
SAVE_OPTIONS = {
    "JPEG": dict(quality=95, subsampling=0),
    "WEBP": dict(quality=95),
    "AVIF": dict(quality=90, subsampling="4:4:4"),
    "HEIF": dict(quality=90),
}
# EXIF tags that do not say how pixels are stored
DESCRIPTIVE = (269, 270, 271, 272, 274, 282, 283, 285, 296, 305, 306, 315, 316, 18246, 18249, 33432, *range(40091, 40096))


@dataclass
class Picture:
    pixels: np.ndarray  # (H, W, 3) RGB or (H, W, 1) gray, uint8 or uint16; of an animation (F, H, W, 3), uint8
    alpha: np.ndarray | None = None  # (H, W, 1) or (F, H, W, 1) of the same type
    exif: bytes | None = None
    options: dict = field(default_factory=dict)  # color profile, dpi, durations: what Pillow's save() takes, and "iptc"
    notes: list[str] = field(default_factory=list)  # what is not as it was, such as "without its layers"


def read_picture(path: Path | str) -> Picture:
    """Read everything in an image file; its ``notes`` tell what cannot be kept. Raises as ``open_image`` does."""
    with open_image(path) as image:
        deep = any(";16" in str(tile[3]) for tile in image.tile)
        if isinstance(image.info.get("transparency"), str):  # a text of that name
            del image.info["transparency"]
        _refuse_other_pixels(image, deep)
        options = {}
        if getattr(image, "n_frames", 1) > 1 and image.format in ANIMATED:
            values = _read_frames(image, options)
        elif deep and image.mode in ("RGB", "RGBA") and "LA;16" not in str(image.tile):
            values = _read_deep(path, image)
        else:
            values = _values(image)
        with open(path, "rb") as file:
            head = file.read(-1 if image.format == "WEBP" else 2**18)  # there a large profile comes before the pixels
        options |= _descriptions(image, head)
        notes = _losses(image, head, options)
        if deep and values.dtype == np.uint8:
            notes.append("8 instead of 16 bits per color")
        try:
            exif = _exif(image)
        except Exception:  # damaged bytes may raise anything
            exif = None
            notes.append("without its EXIF, which is damaged")
    if values.shape[-1] in (2, 4):
        return Picture(values[..., :-1], values[..., -1:], exif, options, notes)
    return Picture(values, None, exif, options, notes)


def _refuse_other_pixels(image: Image.Image, deep: bool) -> None:
    """Raise ``ValueError`` for pixels that would not be read as they are; ``deep`` is 16 bits per color."""
    tags, gray_16 = getattr(image, "tag_v2", {}), image.mode.startswith("I")  # tags of a TIFF
    if image.mode == "1":
        raise ValueError("it is black and white without grays, there is nothing to sharpen")
    if not gray_16 and image.mode not in ("L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK"):
        raise ValueError(f"its pixels are of mode {image.mode}, not gray or color of 8 or 16 bits")
    if tags.get(284) == 2 and max(tags.get(258, (8,))) == 16:
        raise ValueError("its 16-bit colors are in separate planes")
    if deep and 1 in tags.get(338, ()):  # ExtraSamples
        raise ValueError("its alpha is premultiplied")
    if 2 in tags.get(339, ()):  # SampleFormat
        raise ValueError("its pixels are signed")
    if "transparency" in image.info and (deep or gray_16):
        raise ValueError("it has 16 bits and a transparent color")


def _descriptions(image: Image.Image, head: bytes) -> dict:
    """What the loaded ``image`` holds beside pixels and EXIF, as Pillow's save() takes it, and "iptc"; see ``_losses``."""
    kinds = {"dpi": tuple, "xmp": bytes, "comment": (bytes, str), "loop": int, "default_image": bool, "icc_profile": bytes}
    # Of another type in a damaged TIFF. A loop of 0 is endless, and must not be left out: GIF then plays once
    options = {name: image.info[name] for name, kind in kinds.items() if isinstance(image.info.get(name), kind)}
    if image.mode == "CMYK":
        options.pop("icc_profile", None)
    unknown = image.format == "TIFF" and 282 not in image.tag_v2  # then Pillow says 1
    if unknown or not all(0 < each < 1e6 for each in options.get("dpi", ())):  # or not a number: no format can hold it
        options.pop("dpi", None)
    iptc = image.info["photoshop"].get(0x404) if isinstance(image.info.get("photoshop"), dict) else None
    if image.format == "TIFF" and isinstance(iptc := image.tag_v2.get(33723), tuple):  # as Adobe writes it
        iptc = np.array(iptc, "<u4" if image.tag_v2.prefix == b"II" else ">u4").tobytes()
    if isinstance(iptc, bytes):  # else it is damaged
        options["iptc"] = iptc
    if image.format == "WEBP":
        options["lossless"] = re.search(rb"VP8[ L]", head)[0] == b"VP8L"
    if image.format == "PNG":
        options["pnginfo"] = kept = PngImagePlugin.PngInfo()
        for name, text in image.text.items():
            if name == "XML:com.adobe.xmp":
                options["xmp"] = text.encode()
            else:
                kept.add_text(name, text)
        for name, length in (b"gAMA", 4), (b"cHRM", 32), (b"sRGB", 1), (b"cICP", 4):  # colors, of which Pillow writes none
            if chunk := re.search(rb"\0\0\0%c%s(.{%d})" % (length, name, length), head, re.DOTALL):
                kept.add(name, chunk[1])
    return options


def _losses(image: Image.Image, head: bytes, options: dict) -> list[str]:
    """What is in the file, which starts with ``head``, but not in a ``Picture`` with these ``options``."""
    frames, xmp, tags = getattr(image, "n_frames", 1), options.get("xmp", b""), getattr(image, "tag_v2", {})
    nclx = re.search(rb"colrnclx\0(.)\0(.)", head, re.DOTALL)  # primaries and transfer: 1 and 13 are sRGB, 2 is unknown
    deep_ppm = re.match(rb"P6(?:(?:\s|#.*\n)+(\d+)){3}", head)  # the third number is the largest value
    # Boxes of HEIC, AVIF and JPEG 2000 that tell how many bits a color has
    more_bits = re.search(rb"\A.{4}(?:ftyp|jP  ).*(?:pixi.{5}[\x09-\x10]|ihdr.{10}[\x08-\x0f])", head, re.DOTALL)
    shape = image.info.get("aspect") or (image.info.get("jfif_unit") == 0 and image.info.get("jfif_density"))
    losses = {
        "converted from CMYK to RGB": image.mode == "CMYK",
        "8 instead of more bits per color": (more_bits and not image.mode.startswith("I"))
        or (deep_ppm and int(deep_ppm[1]) > 255),
        "without its color space": b"colr\2" in head
        or (nclx and "icc_profile" not in options and (nclx[1] not in b"\1\2" or nclx[2] not in b"\1\2\6\x0d")),
        "without its content credentials": b"jumdc2pa" in head,
        "without its map coordinates": {33550, 33922, 34735}.intersection(tags),
        f"the first of its {frames} images alone": frames > 1 and image.format not in ANIMATED,
        "without its gain map or depth": image.info.get("aux") or image.info.get("depth_images") or b":GDepth" in xmp,
        "without a part of its XMP": b"HasExtendedXMP" in xmp,
        "without its video": re.search(b"MotionPhoto|MicroVideo", xmp),
        "without its layers": 37724 in tags,
        "without its extra channels": 0 in tags.get(338, ()),
        "without the shape of its pixels": isinstance(shape, tuple) and shape[0] != shape[1],
    }
    return [loss for loss, there in losses.items() if there]


def _read_frames(image: Image.Image, options: dict) -> np.ndarray:
    """(F, H, W, 3 or 4) uint8; adds what Pillow needs to save them to ``options``."""
    if image.n_frames * image.width * image.height > MAX_PIXELS:
        raise ValueError(f"its {image.n_frames} frames of {image.width}x{image.height} are too many")
    frames, durations = [], []
    for index in range(image.n_frames):
        image.seek(index)
        frames.append(np.array(image.convert("RGBA")))
        durations.append(image.info.get("duration", 0))
    values = np.stack(frames)
    opaque = values[..., 3].min() == 255
    options |= dict(save_all=True, duration=durations[image.info.get("default_image", False) :])
    if image.format == "GIF" and not opaque:
        options["disposal"] = 2  # or what is transparent shows the frame before
    return values[..., : 3 if opaque else 4]


def _values(image: Image.Image) -> np.ndarray:
    """(H, W, 1 to 4) uint8, or uint16 for deep gray."""
    if image.mode.startswith("I"):
        return deep_gray(image)[..., None]
    if image.mode == "CMYK":
        image = cmyk_to_rgb(image)
    if image.mode in ("P", "PA", "RGBX") or "transparency" in image.info:
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    return pixels_of(image)


def _read_deep(path: Path | str, image: Image.Image) -> np.ndarray:
    """(H, W, 3 or 4) uint16. Pillow keeps one byte of two: it is asked for the first ones, then for the second ones."""
    halves = []
    with open_image(path) as again:
        for half, order in (image, "B"), (again, "L"):
            for k, tile in enumerate(half.tile):
                layout, *rest = [tile.args] if isinstance(tile.args, str) else tile.args
                stored = layout[-1]  # B, L or N: the order of the bytes in the file
                half.tile[k] = tile._replace(args=(layout[:-1] + order, *rest))
            halves.append(np.array(half, np.uint16))
    if stored == "L" or (stored == "N" and sys.byteorder == "little"):
        halves.reverse()
    return halves[0] * 256 + halves[1]


def _exif(image: Image.Image) -> bytes | None:
    """EXIF as one block, as JPEG has it; of a TIFF without its Orientation, which Pillow applied. Raises if damaged."""
    exif = image.info.get("exif")
    if not exif:
        found, kept = exif_of(image), Image.Exif()
        kept.update({tag: found[tag] for tag in DESCRIPTIVE if tag in found and (tag, image.format) != (274, "TIFF")})
        # Blocks of exposure etc. and GPS
        kept.update({block: dict(found.get_ifd(block)) for block in (0x8769, 0x8825) if found.get_ifd(block)})
        exif = kept.tobytes() if len(kept) else b""
    Image.Exif().load(exif)
    return b"Exif\0\0" + exif.removeprefix(b"Exif\0\0") if exif else None  # which WebP leaves out


def write_picture(path: Path, picture: Picture) -> list[str]:
    """Write ``picture`` in the format of ``path``'s suffix, one of FORMATS, whole or not at all.

    Returns its ``notes``, to which descriptions that the format cannot hold are added; for pixels that it cannot hold it
    raises ``UserError``. WebP that was read from a lossless one is lossless.
    """
    kind = FORMATS[path.suffix.lower()]
    for feature, formats, needed in (
        ("animations", ANIMATED, picture.pixels.ndim == 4),
        ("transparency", TRANSPARENT, picture.alpha is not None),
        ("16 bits", ("PNG", "TIFF"), picture.pixels.dtype == np.uint16),
    ):
        if needed and kind not in formats:
            raise UserError(f"{path} cannot be written: {kind} has no {feature}, choose a name that ends in .png")
    if kind == "HEIF":
        load_heif(path)
    options = SAVE_OPTIONS.get(kind, {}) | picture.options | ({"exif": picture.exif} if picture.exif else {})
    gray = options.get("icc_profile", b"")[16:20] == b"GRAY"  # does not fit where gray is stored as RGB
    for name, key, formats in (
        ("EXIF", "exif", DESCRIBED),
        ("XMP", "xmp", DESCRIBED),
        ("IPTC", "iptc", ("JPEG", "TIFF")),
        ("color profile", "icc_profile", ("JPEG", "PNG", "TIFF", "HEIF") if gray else DESCRIBED),
    ):
        if kind not in formats and options.pop(key, None):
            picture.notes.append(f"without its {name}, which {kind} cannot hold")
    if kind != "PNG" and any(b"cICP" in chunk for chunk in getattr(options.get("pnginfo"), "chunks", ())):
        picture.notes.append(f"without its color space, which {kind} cannot hold")
    try:
        content = _encode(picture, kind, options)
    except Exception as error:  # damaged EXIF or too long a side may raise anything
        raise UserError(f"{path} cannot be written as {kind} ({error}): choose a name that ends in .png") from None
    with atomic(path) as partial:
        partial.write_bytes(content)
    return picture.notes


def _encode(picture: Picture, kind: str, options: dict) -> memoryview:
    """The content of a file of format ``kind``, which can hold what is in ``options``."""
    values = picture.pixels if picture.alpha is None else np.concatenate([picture.pixels, picture.alpha], axis=-1)
    iptc, xmp, deep = options.pop("iptc", None), options.get("xmp"), values.dtype == np.uint16
    if kind == "PNG" and xmp:
        info = options.setdefault("pnginfo", PngImagePlugin.PngInfo())
        info.add_itxt("XML:com.adobe.xmp", xmp.decode(errors="replace"))
    if kind == "JPEG" and iptc:  # in an image resource block of Photoshop
        block = b"Photoshop 3.0\0" + b"8BIM\4\4\0\0" + struct.pack(">I", len(iptc)) + iptc + bytes(len(iptc) % 2)
        options["extra"] = b"\xff\xed" + struct.pack(">H", len(block) + 2) + block
    if kind == "TIFF":
        tags = Image.Exif()
        tags.load(picture.exif or b"")
        tags.update({tag: value for tag, value in ((700, xmp), (33723, iptc)) if value})
        if len(tags):  # which Pillow cannot write into a compressed one
            options["exif"] = tags
        else:
            options["compression"] = "tiff_adobe_deflate" if deep else "tiff_lzw"
    if deep and values.shape[2] > 1:
        return _deep_png(values, options) if kind == "PNG" else _deep_tiff(values, options)
    frames, palette = values if values.ndim == 4 else [values], None
    if len(frames) > 1 and kind == "GIF":  # with palettes of their own what stands still would flicker
        palette = Image.fromarray(np.concatenate([frame[::2, ::2, :3] for frame in frames])).quantize(255)
    first, *more = [_to_image(frame, kind, palette) for frame in frames]
    content = io.BytesIO()
    first.save(content, kind, append_images=more, **options)
    return content.getbuffer()


def _deep_png(values: np.ndarray, options: dict) -> memoryview:
    """16-bit color PNG, which Pillow cannot write; source: the PNG specification, sections 5 and 11."""
    height, width, channels = values.shape
    rows = np.ascontiguousarray(values.astype(">u2")).view(np.uint8).reshape(height, -1)
    differences = np.diff(rows, axis=0, prepend=np.zeros_like(rows[:1]))
    lines = np.insert(differences, 0, 2, axis=1)  # filter 2: the difference to the row above
    # Of a single pixel of 8 bits, Pillow's header, which ends after 33 bytes, and pixel are replaced
    Image.new("RGB", (1, 1)).save(pixel := io.BytesIO(), "PNG", **options)
    signature, descriptions = pixel.getvalue()[:8], pixel.getvalue()[33 : pixel.getvalue().rindex(b"IDAT") - 4]
    content = io.BytesIO()
    content.write(signature)
    header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    PngImagePlugin.putchunk(content, b"IHDR", header)
    content.write(descriptions)
    PngImagePlugin.putchunk(content, b"IDAT", zlib.compress(lines))
    PngImagePlugin.putchunk(content, b"IEND", b"")
    return content.getbuffer()


def _deep_tiff(values: np.ndarray, options: dict) -> memoryview:
    """16-bit color TIFF, which Pillow cannot write; source: TIFF 6.0, section 2."""
    height, width, channels = values.shape
    content = io.BytesIO()
    # One of 8 bits and twice the width has the same bytes; then two tags are corrected
    halves = values.astype("<u2").view(np.uint8).reshape(height, 2 * width, channels)
    Image.fromarray(halves).save(content, "TIFF", **options)
    data = content.getbuffer()
    first = struct.unpack_from("<I", data, 4)[0]
    for entry in range(first + 2, first + 2 + 12 * struct.unpack_from("<H", data, first)[0], 12):
        tag, value = struct.unpack_from("<H6xI", data, entry)
        if tag == 256:  # ImageWidth
            struct.pack_into("<I", data, entry + 8, width)
        elif tag == 258:  # BitsPerSample
            struct.pack_into(f"<{channels}H", data, value, *[16] * channels)
    return data


def _to_image(values: np.ndarray, kind: str, palette: Image.Image | None) -> Image.Image:
    image = Image.fromarray(values[..., 0] if values.shape[2] == 1 else values)
    has_alpha = image.mode in ("LA", "RGBA")
    if kind == "GIF" and (has_alpha or palette):  # Pillow's own palette with transparency has few colors
        clear = image.getchannel("A").point(lambda alpha: 255 * (alpha < 128)) if has_alpha else None
        image = image.convert("RGB").quantize(255, palette=palette, dither=Image.Dither.NONE)
        if clear:
            image.paste(255, mask=clear)
            image.info["transparency"] = 255
    return image
