"""An image file -> its pixels and everything else it contains, and back: for applying a network, not for training one.

Depth (8 or 16 bits), gray, transparency, EXIF and color profile are kept. Pixels stay as stored: those of a JPEG with an
EXIF orientation are not rotated, those of a TIFF are and the tag is removed; either way it looks as before.
"""

import io
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from images.files import atomic_write
from images.photos import describe_error, open_image
from utils import UserError

FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".bmp": "BMP",
}

REFUSED = {
    "1": "is black and white without grays: there is nothing to sharpen",
    "CMYK": "is CMYK, for printing: convert it to RGB first",
    "F": "has floating-point pixels: save it with 8 or 16 bits first",
}

DESCRIPTIVE = (270, 271, 272, 274, 282, 283, 296, 305, 306, 315, 33432)  # EXIF tags that do not say how pixels are stored


@dataclass
class Picture:
    pixels: np.ndarray  # (H, W, 3) RGB or (H, W, 1) gray, uint8 or uint16
    alpha: np.ndarray | None = None  # (H, W, 1) of the same type
    exif: bytes | None = None
    options: dict = field(default_factory=dict)  # color profile, dpi: what Pillow's save() takes


def read_picture(path: Path | str) -> Picture:
    """Read everything in an image file.

    Raises:
        UserError: if it is missing, cannot be decoded completely, or cannot be kept as it is: several frames, CMYK, floating
            point.
    """
    try:
        return _read(Path(path))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except UserError:
        raise
    except Exception as error:  # damaged bytes may raise anything in a decoder
        raise UserError(f"{path} cannot be read as an image ({describe_error(error)}): replace or remove it") from None


def _read(path: Path) -> Picture:
    # From an open file: given a path, Pillow maps some rotated TIFFs into memory in the wrong shape
    with open(path, "rb") as file, open_image(file) as image:
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # MPO: a JPEG with a preview, from a phone
            raise UserError(f"{path} contains {image.n_frames} frames: save them as single images first")
        if image.mode in REFUSED:
            raise UserError(f"{path} {REFUSED[image.mode]}")
        deep = _is_deep_color(image)
        exif = image.info.get("exif") or _descriptive_exif(image, rotated=image.format == "TIFF" and not deep)
        if exif and not exif.startswith(b"Exif\0\0"):  # which WebP leaves out
            exif = b"Exif\0\0" + exif
        if "transparency" in image.info and (deep or image.mode.startswith("I")):
            raise UserError(f"{path} has 16 bits and one transparent color: save it with an alpha channel or 8 bits")
        if not deep:
            values = _values(path, image)
        options = {name: image.info[name] for name in ("icc_profile", "dpi") if image.info.get(name)}
        kind, fourth = image.format, image.tag_v2.get(338, (0,))[0] if image.format == "TIFF" else 0  # ExtraSamples
    if deep:
        values = _read_deep_tiff(path, fourth) if kind == "TIFF" else _read_deep_png(path)
    channels = values.shape[2] - (values.shape[2] % 2 == 0)  # 2 is gray and alpha, 4 is RGB and alpha
    return Picture(values[..., :channels], values[..., channels:] if channels < values.shape[2] else None, exif, options)


def _values(path: Path, image: Image.Image) -> np.ndarray:
    """(H, W, 1 to 4) uint8, or uint16 for deep gray."""
    if image.format == "TIFF" and 2 in image.tag_v2.get(339, ()):  # SampleFormat
        raise UserError(f"{path} has signed pixels: save it as plain gray first")
    if image.mode.startswith("I"):
        values = np.array(image)
        if values.min() < 0 or values.max() > 65535:
            raise UserError(f"{path} has 32-bit pixels: save it with 8 or 16 bits first")
        if image.format == "TIFF" and image.tag_v2.get(262) == 0:  # white is zero, which Pillow undoes for 8 bits only
            values = 65535 - values
        return values.astype(np.uint16)[..., None]
    if image.mode in ("P", "PA") or "transparency" in image.info:
        image = image.convert("RGBA" if image.mode == "PA" or "transparency" in image.info else "RGB")
    if image.mode not in ("L", "LA", "RGB", "RGBA", "RGBX"):
        raise UserError(f"{path} has color mode {image.mode}: convert it to RGB first")
    values = np.array(image.convert("RGB") if image.mode == "RGBX" else image)
    return values if values.ndim == 3 else values[..., None]


def _is_deep_color(image: Image.Image) -> bool:
    """Whether it is 16-bit color, which Pillow reads as 8 bits."""
    if image.format == "TIFF":
        return image.mode in ("RGB", "RGBA", "RGBX") and max(image.tag_v2.get(258, (8,))) == 16  # BitsPerSample
    return (
        image.format == "PNG"
        and any(";16" in str(tile[3]) and image.mode != "I;16" for tile in image.tile)
        and (image.mode in ("RGB", "RGBA"))
    )


def _read_deep_png(path: Path) -> np.ndarray:
    """(H, W, 3 or 4) uint16. Pillow keeps one byte of two: it is asked for the high ones, then for the low ones."""
    halves = []
    for order in ("B", "L"):
        with Image.open(path) as image:
            decoder, box, offset, layout = image.tile[0][:4]
            if layout not in ("RGB;16B", "RGBA;16B"):
                raise UserError(f"{path} is 16-bit gray with transparency: save it without, or with 8 bits")
            image.tile = [(decoder, box, offset, layout[:-1] + order)]
            halves.append(np.array(image, np.uint16))
    return halves[0] * 256 + halves[1]


def _read_deep_tiff(path: Path, fourth: int) -> np.ndarray:
    """(H, W, 3 or 4) uint16. ``fourth`` is the TIFF tag for a fourth channel: 1 and 2 are alpha."""
    import tifffile  # installed with scikit-image

    try:
        values = tifffile.imread(path)
    except tifffile.TiffFileError as error:
        raise UserError(f"{path} cannot be read as an image ({error}): replace or remove it") from None
    except ValueError as error:  # a compression that needs another package
        if "failed to read" in str(error):
            raise UserError(f"{path} cannot be read as an image (it is truncated): replace or remove it") from None
        raise UserError(f"{path} cannot be read with 16 bits ({error}): save it without compression first") from None
    if values.ndim != 3 or values.shape[2] not in (3, 4) or values.dtype != np.uint16:
        raise UserError(f"{path} stores its 16-bit colors in separate planes: save it as plain RGB first")
    if values.shape[2] == 4 and fourth == 1:
        raise UserError(f"{path} has 16 bits and premultiplied alpha: save it with plain alpha first")
    return values[..., : 4 if fourth == 2 else 3]


def _descriptive_exif(image: Image.Image, rotated: bool) -> bytes | None:
    """EXIF of a file that does not store it as one block, such as TIFF, without its Orientation if it is ``rotated``."""
    found, kept = image.getexif(), Image.Exif()
    for tag in DESCRIPTIVE:
        if tag in found and not (rotated and tag == 274):
            kept[tag] = found[tag]
    for block in (0x8769, 0x8825):  # exposure etc., GPS
        values = found.get_ifd(block)
        if values:
            kept[block] = dict(values)
    return kept.tobytes() if len(kept) else None


def write_picture(path: Path | str, picture: Picture) -> None:
    """Write ``picture`` in the format of ``path``'s suffix, whole or not at all. JPEG and WebP at quality 95.

    Raises:
        UserError: if the format cannot store it, or the file cannot be written.
    """
    path = Path(path)
    kind, deep = FORMATS.get(path.suffix.lower()), picture.pixels.dtype == np.uint16
    if kind is None:
        raise UserError(f"{path} does not end in one of {', '.join(FORMATS)}")
    if picture.alpha is not None and kind in ("JPEG", "BMP"):
        raise UserError(f"{path} cannot be written: {kind} has no transparency, choose a name that ends in .png")
    if deep and kind not in ("PNG", "TIFF"):
        raise UserError(f"{path} cannot be written: {kind} has no 16 bits, choose a name that ends in .png or .tif")
    values = picture.pixels if picture.alpha is None else np.concatenate([picture.pixels, picture.alpha], axis=2)
    extra = dict(picture.options)
    if picture.exif and kind != "BMP":
        extra["exif"] = picture.exif
    options = {"JPEG": dict(quality=95, subsampling=0), "WEBP": dict(quality=95)}
    if kind == "TIFF" and not picture.exif:  # Pillow cannot write EXIF into a compressed one
        extra["compression"] = "tiff_lzw"

    def save(partial: Path) -> None:
        try:
            if deep and values.shape[2] > 1:
                (_write_deep_png if kind == "PNG" else _write_deep_tiff)(partial, values, extra)
                return
            image = Image.fromarray(values[..., 0] if values.shape[2] == 1 else values)
            image = image.convert("RGBA") if kind == "WEBP" and image.mode == "LA" else image
            content = io.BytesIO()  # on a full disk libtiff gives no reason and prints its own messages
            image.save(content, kind, **options.get(kind, {}), **extra)
            partial.write_bytes(content.getbuffer())
        except OSError as error:
            if error.errno is None:  # not from the disk
                raise UserError(f"{path} cannot be written as {kind} ({error}): choose a name that ends in .png") from None
            raise
        except Exception as error:  # damaged EXIF or too long a side may raise anything
            raise UserError(f"{path} cannot be written as {kind} ({error}): choose a name that ends in .png") from None

    atomic_write(path, save)


def _write_deep_png(path: Path, values: np.ndarray, extra: dict) -> None:
    """16-bit color PNG, which Pillow cannot write. Source: the PNG specification, sections 5 and 11."""
    height, width, channels = values.shape

    def chunk(file, name: bytes, content: bytes) -> None:
        file.write(struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content)))

    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        chunk(file, b"IHDR", struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0))
        if "icc_profile" in extra:
            chunk(file, b"iCCP", b"ICC profile\0\0" + zlib.compress(extra["icc_profile"]))
        if "dpi" in extra:
            chunk(file, b"pHYs", struct.pack(">IIB", *(round(float(n) / 0.0254) for n in extra["dpi"]), 1))
        if "exif" in extra:
            chunk(file, b"eXIf", extra["exif"].removeprefix(b"Exif\0\0"))
        packer, above = zlib.compressobj(6), np.zeros((1, width * channels * 2), np.uint8)
        for top in range(0, height, 256):
            rows = np.ascontiguousarray(values[top : top + 256].astype(">u2")).view(np.uint8).reshape(-1, above.size)
            lines = np.full((len(rows), 1 + above.size), 2, np.uint8)  # filter 2: the difference to the row above
            lines[:, 1:] = rows - np.concatenate([above, rows[:-1]])
            chunk(file, b"IDAT", packer.compress(lines.tobytes()))
            above = rows[-1:]
        chunk(file, b"IDAT", packer.flush())
        chunk(file, b"IEND", b"")


def _write_deep_tiff(path: Path, values: np.ndarray, extra: dict) -> None:
    """16-bit color TIFF, which Pillow cannot write; of EXIF, the text that TIFF stores in its own tags."""
    import tifffile  # installed with scikit-image

    exif = Image.Exif()
    exif.load(extra.get("exif", b""))
    tags = [(274, "H", 1, exif[274], True)] if 274 in exif else []  # Orientation
    texts = {tag: str(exif[tag]) for tag in (270, 271, 272, 306, 315, 33432) if tag in exif}
    tags += [(tag, "s", 0, text.encode("latin-1", "replace") + b"\0", True) for tag, text in texts.items()]
    if "icc_profile" in extra:
        tags.append((34675, "B", len(extra["icc_profile"]), extra["icc_profile"], True))
    tifffile.imwrite(
        path,
        values,
        photometric="rgb",
        extrasamples=["unassalpha"] if values.shape[2] == 4 else None,
        compression="zlib",
        resolution=extra.get("dpi"),
        resolutionunit="inch" if "dpi" in extra else None,
        extratags=tags,
        metadata=None,
    )
