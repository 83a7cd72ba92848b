"""A picture file -> its pixels and all else that it holds, and back: for using a network, not for training one.

Depth (8 or 16 bits), grey, transparency, EXIF and colour profile are kept. Pixels stay as Pillow gives them: of a
JPEG that EXIF turns they are not turned, of a TIFF they are and the tag is gone; either way it looks as before.
"""

import io

import struct

import warnings

import zlib

from dataclasses import dataclass, field

from pathlib import Path

import numpy as np

from PIL import Image

from files import atomic_write

from photos import open_picture, why

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
    "1": "is black and white without greys: there is nothing to sharpen",
    "CMYK": "has the inks of a printer instead of RGB: convert it to RGB first",
    "F": "has pixels of floating point: save it with 8 or 16 bits first",
}

DESCRIPTIVE = (270, 271, 272, 274, 282, 283, 296, 305, 306, 315, 33432)  # of EXIF's tags: not how pixels are stored

@dataclass
class Picture:
    pixels: np.ndarray  # (H, W, 3) RGB or (H, W, 1) grey, uint8 or uint16
    alpha: np.ndarray | None = None  # (H, W, 1) of the same type
    exif: bytes | None = None
    options: dict = field(default_factory=dict)  # colour profile, dpi: what Pillow's save() takes

def read_picture(path: Path | str) -> Picture:
    """All that is in a picture file.

    Raises:
        UserError: one sentence if it is missing, cannot be decoded whole, or is of a kind that cannot be kept
            as it is: several frames, CMYK, floating point.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd metadata, and of photos above 89 megapixels
            return _read(Path(path))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except UserError:
        raise
    except Exception as error:  # a decoder fed damaged bytes may raise anything
        raise UserError(f"{path} cannot be read as a picture ({why(error)}): replace or remove it") from None

def _read(path: Path) -> Picture:
    # From an open file: given a path, Pillow maps some turned TIFFs into memory in the wrong shape
    with open(path, "rb") as file, open_picture(file) as image:
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # phones add a preview to a JPEG
            raise UserError(f"{path} holds {image.n_frames} frames: save them as single pictures first")
        if image.mode in REFUSED:
            raise UserError(f"{path} {REFUSED[image.mode]}")
        deep = _is_deep_colour(image)
        exif = image.info.get("exif") or _descriptive_exif(image, turned=image.format == "TIFF" and not deep)
        if exif and not exif.startswith(b"Exif\0\0"):  # which WebP leaves out
            exif = b"Exif\0\0" + exif
        if "transparency" in image.info and (deep or image.mode.startswith("I")):
            raise UserError(f"{path} has 16 bits and one transparent colour: save it with an alpha channel or 8 bits")
        if not deep:
            values = _values(path, image)
        options = {name: image.info[name] for name in ("icc_profile", "dpi") if image.info.get(name)}
        kind, fourth = image.format, image.tag_v2.get(338, (0,))[0] if image.format == "TIFF" else 0  # ExtraSamples
    if deep:
        values = _read_deep_tiff(path, fourth) if kind == "TIFF" else _read_deep_png(path)
    channels = values.shape[2] - (values.shape[2] % 2 == 0)  # 2 is grey and alpha, 4 is RGB and alpha
    return Picture(values[..., :channels], values[..., channels:] if channels < values.shape[2] else None, exif, options)

def _values(path: Path, image: Image.Image) -> np.ndarray:
    """(H, W, 1 to 4) uint8, or uint16 for deep grey."""
    if image.format == "TIFF" and 2 in image.tag_v2.get(339, ()):  # SampleFormat
        raise UserError(f"{path} has pixels with a sign: save it as plain grey first")
    if image.mode.startswith("I"):
        values = np.array(image)
        if values.min() < 0 or values.max() > 65535:
            raise UserError(f"{path} has pixels of 32 bits: save it with 8 or 16 bits first")
        if image.format == "TIFF" and image.tag_v2.get(262) == 0:  # white is zero, which Pillow undoes for 8 bits only
            values = 65535 - values
        return values.astype(np.uint16)[..., None]
    if image.mode in ("P", "PA") or "transparency" in image.info:
        image = image.convert("RGBA" if image.mode == "PA" or "transparency" in image.info else "RGB")
    if image.mode not in ("L", "LA", "RGB", "RGBA", "RGBX"):
        raise UserError(f"{path} has colours of the kind {image.mode}: convert it to RGB first")
    values = np.array(image.convert("RGB") if image.mode == "RGBX" else image)
    return values if values.ndim == 3 else values[..., None]

def _is_deep_colour(image: Image.Image) -> bool:
    """Whether it has 16 bits and colours, which Pillow reads as 8 bits."""
    if image.format == "TIFF":
        return image.mode in ("RGB", "RGBA", "RGBX") and max(image.tag_v2.get(258, (8,))) == 16  # BitsPerSample
    return (
        image.format == "PNG"
        and any(";16" in str(tile[3]) and image.mode != "I;16" for tile in image.tile)
        and (image.mode in ("RGB", "RGBA"))
    )

def _read_deep_png(path: Path) -> np.ndarray:
    """(H, W, 3 or 4) uint16. Pillow keeps one byte of the two: it is asked for the high ones, then for the low ones."""
    halves = []
    for order in ("B", "L"):
        with Image.open(path) as image:
            decoder, box, offset, layout = image.tile[0][:4]
            if layout not in ("RGB;16B", "RGBA;16B"):
                raise UserError(f"{path} is grey of 16 bits with transparency: save it without, or with 8 bits")
            image.tile = [(decoder, box, offset, layout[:-1] + order)]
            halves.append(np.array(image, np.uint16))
    return halves[0] * 256 + halves[1]

def _read_deep_tiff(path: Path, fourth: int) -> np.ndarray:
    """(H, W, 3 or 4) uint16. ``fourth`` is what the file says of a fourth channel: 1 and 2 are alpha."""
    import tifffile  # comes with scikit-image

    try:
        values = tifffile.imread(path)
    except tifffile.TiffFileError as error:
        raise UserError(f"{path} cannot be read as a picture ({error}): replace or remove it") from None
    except ValueError as error:  # a compression that needs another package
        if "failed to read" in str(error):
            raise UserError(f"{path} cannot be read as a picture (it is cut off): replace or remove it") from None
        raise UserError(f"{path} cannot be read with 16 bits ({error}): save it without compression first") from None
    if values.ndim != 3 or values.shape[2] not in (3, 4) or values.dtype != np.uint16:
        raise UserError(f"{path} keeps its 16-bit colours apart from each other: save it as plain RGB first")
    if values.shape[2] == 4 and fourth == 1:
        raise UserError(f"{path} has 16 bits and colours multiplied by its alpha: save it with plain alpha first")
    return values[..., : 4 if fourth == 2 else 3]

def _descriptive_exif(image: Image.Image, turned: bool) -> bytes | None:
    """EXIF of a file that does not keep it in one piece, such as TIFF, without its Orientation if it is ``turned``."""
    found, kept = image.getexif(), Image.Exif()
    for tag in DESCRIPTIVE:
        if tag in found and not (turned and tag == 274):
            kept[tag] = found[tag]
    for block in (0x8769, 0x8825):  # exposure and the like, place
        values = found.get_ifd(block)
        if values:
            kept[block] = dict(values)
    return kept.tobytes() if len(kept) else None

def write_picture(path: Path | str, picture: Picture) -> None:
    """Write ``picture`` in the format of ``path``'s suffix, whole or not at all. JPEG and WebP at quality 95.

    Raises:
        UserError: if the format cannot hold it, or the file cannot be written.
    """
    path = Path(path)
    kind, deep = FORMATS.get(path.suffix.lower()), picture.pixels.dtype == np.uint16
    if kind is None:
        raise UserError(f"{path} does not end in one of {', '.join(FORMATS)}")
    if picture.alpha is not None and kind in ("JPEG", "BMP"):
        raise UserError(f"{path} cannot be written: {kind} holds no transparency, choose a name that ends in .png")
    if deep and kind not in ("PNG", "TIFF"):
        raise UserError(f"{path} cannot be written: {kind} holds no 16 bits, choose a name that ends in .png or .tif")
    values = picture.pixels if picture.alpha is None else np.concatenate([picture.pixels, picture.alpha], axis=2)
    extra = dict(picture.options)
    if picture.exif and kind != "BMP":
        extra["exif"] = picture.exif
    options = {"JPEG": dict(quality=95, subsampling=0), "WEBP": dict(quality=95)}
    if kind == "TIFF" and not picture.exif:  # Pillow cannot write EXIF's own blocks into a packed one
        extra["compression"] = "tiff_lzw"

    def save(partial: Path) -> None:
        try:
            if deep and values.shape[2] > 1:
                (_write_deep_png if kind == "PNG" else _write_deep_tiff)(partial, values, extra)
                return
            image = Image.fromarray(values[..., 0] if values.shape[2] == 1 else values)
            image = image.convert("RGBA") if kind == "WEBP" and image.mode == "LA" else image
            content = io.BytesIO()  # on a full disk TIFF's library would give no reason, and lines of its own
            image.save(content, kind, **options.get(kind, {}), **extra)
            partial.write_bytes(content.getbuffer())
        except OSError as error:
            if error.errno is None:  # not of the disk
                raise UserError(f"{path} cannot be written as {kind} ({error}): choose a name that ends in .png") from None
            raise
        except Exception as error:  # damaged EXIF or a side that is too long may raise anything
            raise UserError(f"{path} cannot be written as {kind} ({error}): choose a name that ends in .png") from None

    atomic_write(path, save)

def _write_deep_png(path: Path, values: np.ndarray, extra: dict) -> None:
    """PNG of 16 bits and colours, which Pillow cannot write. Source: the PNG specification, sections 5 and 11."""
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
    """TIFF of 16 bits and colours, which Pillow cannot write; of EXIF, the text that TIFF keeps among its own tags."""
    import tifffile  # comes with scikit-image

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
