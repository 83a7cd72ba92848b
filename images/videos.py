"""Videos whose frames are changed one by one, with PyAV 18 or newer (``pip install -r requirements-extras.txt``)."""

import contextlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from images.files import atomic
from images.photos import describe_error
from utils import UserError

VIDEO_FORMATS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}  # FFmpeg's names
# A file that only looks like a video may name others to be opened: playlists, lists of files
READABLE = {"format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts", "protocol_whitelist": "file"}
QUALITY = {"crf": "16", "preset": "medium"}  # of H.264: visually lossless
COLORS = "colorspace", "color_range", "color_primaries", "color_trc"
CONTAINER_TAGS = "major_brand", "minor_version", "compatible_brands", "encoder"  # metadata that the muxer writes anew


def map_frames(video: Path, result: Path, change: Callable[[np.ndarray], np.ndarray]) -> list[str]:
    """Write ``video`` with ``change(frame)`` in place of each frame, (H, W, 3) uint8 RGB.

    Frames keep their times, even at a variable rate, and their size, rotation, pixel shape, color matrix and range, and are
    encoded as H.264. Sound, subtitles and chapters are copied as they are, with titles, languages and dates. ``result`` is
    written whole or not at all. Returns what is not kept, such as "without its transparency".

    Raises ``UserError`` if ``video`` is interlaced, has more than 8 bits per color or cannot be read, if ``result`` cannot
    be written, and without PyAV; after writing, if a part of ``video`` is damaged or missing.
    """
    av = _import_av(video)
    if not video.is_file():
        raise UserError(f"{video} is missing")
    with atomic(result) as partial:
        try:
            with av.open(f"file:{video}", container_options=READABLE) as probe:
                stream = probe.streams.best("video")
                first = next(probe.decode(stream), None) if stream else None
            if first is None:
                raise UserError(f"{video} contains no frames")
            damaged, format = _is_damaged(av, video), VIDEO_FORMATS[result.suffix.lower()]
            with av.open(f"file:{video}", container_options=READABLE) as source:
                # With these tags MP4 and MOV hold a phone's metadata, but many players then find no title
                from_a_phone = any("." in name or name in ("make", "model") for name in source.metadata)
                options = {"movflags": "use_metadata_tags"} if from_a_phone and format != "matroska" else {}
                with av.open(f"file:{partial}", "w", format=format, options=options) as target:
                    notes = _map_frames(av, source, target, first, change, video, result.suffix.lower())
        except av.error.FFmpegError as error:  # often an OSError, too
            advice = "replace it, or encode it again with another program first"
            raise UserError(f"{video} cannot be sharpened as a video ({describe_error(error)}): {advice}") from None
    if damaged:
        kept = ", ".join([f"{result} holds what could be read", *notes])
        raise UserError(f"{video} is damaged or was cut off: {kept}; copy the video again from where it came")
    return notes


def _import_av(video: Path):
    with contextlib.suppress(ImportError):
        import av  # an extra

        if int(av.__version__.partition(".")[0]) >= 18:
            return av
    raise UserError(f"{video} is a video: install PyAV 18 or newer to sharpen it, pip install 'av>=18' (Python 3.11)")


def _is_damaged(av, video: Path) -> bool:
    """Whether FFmpeg says so while it reads the packets, or none of them reaches the end that the file tells."""
    # Not while frames are decoded: messages of the decoder's threads may wait for Python's lock forever
    level = av.logging.get_level()
    with av.open(f"file:{video}", container_options=READABLE) as source:
        try:
            av.logging.set_level(av.logging.ERROR)
            with av.logging.Capture() as messages:
                ends = (p.time_base * (max(p.pts or 0, p.dts or 0) + (p.duration or 0)) for p in source.demux() if p.size)
                end = float(max(ends, default=0))  # seconds
        finally:
            av.logging.set_level(level)
        said = any(name == source.format.name for _, name, _ in messages)  # a parser also complains of healthy files
        return said or end < 0.99 * (source.duration or 0) / 1e6 - 1


def _map_frames(av, source, target, first, change: Callable[[np.ndarray], np.ndarray], path: Path, suffix: str) -> list[str]:
    """Copy the open ``source``, the file ``path``, whose first frame is ``first``, to ``target``; returns what is lost."""
    video = source.streams.best("video")
    video.thread_type = "AUTO"  # decode on all cores
    written = target.add_stream("libx264", rate=video.average_rate, options=QUALITY)
    _configure(written, video, first)
    others = [stream for stream in source.streams if stream.type in ("audio", "subtitle") and stream.codec_context]
    copies = {}
    for stream in others:
        if (codec := stream.codec_context.name) not in target.supported_codecs:
            kind, other = "sound" if stream.type == "audio" else "subtitles", ".mp4" if suffix == ".mkv" else ".mkv"
            raise UserError(f"{path} has {codec} {kind}, which {suffix} cannot hold: choose {other} with -o")
        copies[stream.index] = target.add_stream_from_template(stream)
        copies[stream.index].disposition = stream.disposition  # default, forced, comment, ...
    for before, after in (source, target), (video, written), *((stream, copies[stream.index]) for stream in others):
        after.metadata.update({name: text for name, text in before.metadata.items() if name.lower() not in CONTAINER_TAGS})
    target.set_chapters(source.chapters())
    # Time codes the muxer writes anew from the metadata
    lost = Counter(s.type for s in source.streams if s not in (video, *others) and "timecode" not in s.metadata)
    if source.chapters() and lost["data"] and "mp4" in source.format.name:
        lost["data"] -= 1  # the names of the chapters
    notes = [f"without {count} other {kind} stream{'s' * (count > 1)}" for kind, count in lost.items() if count]
    if any(component.is_alpha for component in first.format.components):
        notes.append("without its transparency")
    if _has_finer_colors(first.format, av.VideoFormat(written.codec_context.pix_fmt)):
        notes.append("its colors at half the resolution")
    captions, last, durations = False, (first.pts or 0) - 1, {}

    def encode(frame) -> None:
        for packet in written.encode(frame):
            packet.duration = durations.pop(packet.pts, 0) or packet.duration  # that of the encoder is always the same
            target.mux(packet)

    with tqdm(desc="sharpening", total=video.frames or None, unit="frame", leave=False, disable=None) as bar:
        for packet in source.demux(video, *others):
            if packet.stream.index == video.index:
                for frame in packet.decode():
                    if frame.pts is None or frame.pts <= last:  # FFmpeg refuses that
                        frame.pts = last + max(1, frame.duration)
                    last, durations[frame.pts] = frame.pts, frame.duration
                    _check_frame(frame, first, path)
                    captions = captions or "A53_CC" in frame.side_data
                    encode(_changed(av, frame, change, written.codec_context))
                    bar.update()
            elif packet.dts is not None:  # None: the end of the stream
                packet.stream = copies[packet.stream.index]
                target.mux(packet)
        encode(None)
    return [*notes, *["without its closed captions"] * captions]


def _check_frame(frame, first, path: Path) -> None:
    """Raise ``UserError`` if ``frame``, of the file ``path``, cannot be changed or has another size than the ``first``."""
    bits = max(component.bits for component in frame.format.components)
    if bits > 8 or frame.interlaced_frame:
        reason = "is interlaced" if frame.interlaced_frame else f"has {bits} bits per color"
        raise UserError(f"{path} {reason}: convert it to 8 bits and progressive frames first")
    if (frame.width, frame.height) != (first.width, first.height):
        raise UserError(f"{path} changes to {frame.width}x{frame.height} after {frame.time:.1f} seconds: cut it there first")


def _configure(written, video, frame) -> None:
    """Tell the encoder of the stream ``written`` what is known of ``video`` and its first frame."""
    encoder = written.codec_context
    encoder.width, encoder.height, encoder.time_base = frame.width, frame.height, video.time_base
    even = frame.width % 2 == 0 and frame.height % 2 == 0  # chroma of half the size needs that
    same = frame.format.name in ("yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p")
    encoder.pix_fmt = frame.format.name if same and even else "yuv420p" if even else "yuv444p"
    if video.sample_aspect_ratio:
        encoder.sample_aspect_ratio = video.sample_aspect_ratio
    for color in COLORS:
        setattr(encoder, color, getattr(frame, color))
    if frame.format.is_rgb:  # which needs a matrix to become YUV
        encoder.colorspace = 1  # BT.709
    rotation = frame.rotation + 180 * _is_mirrored(frame)  # then its pixels are flipped
    if rotation % 360:
        written.set_display_rotation(rotation)


def _has_finer_colors(format, other) -> bool:
    """Whether a pixel ``format`` has chroma, or RGB, of a higher resolution than the ``other``."""
    gray = len(format.components) < 3 and not format.has_palette
    finer = format.chroma_width(64) > other.chroma_width(64) or format.chroma_height(64) > other.chroma_height(64)
    return finer and not gray


def _is_mirrored(frame) -> bool:
    """Whether players mirror it: its display matrix, nine numbers in rows, is no rotation."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    a, b, _, c, d, *_ = np.frombuffer(bytes(matrix), np.int32).astype(float) if matrix else (1, 0, 0, 0, 1)
    return a * d < b * c


def _changed(av, frame, change: Callable[[np.ndarray], np.ndarray], encoder):
    """``change(frame)`` as the ``encoder`` takes it, with the times of ``frame``."""
    matrix = encoder.colorspace if encoder.colorspace in set(av.video.reformatter.Colorspace) else None
    full, methods = av.video.reformatter.ColorRange.JPEG, av.video.reformatter.Interpolation
    # Without these flags each frame becomes darker by a gray level
    exact = methods.BICUBIC | methods.ACCURATE_RND | methods.FULL_CHR_H_INT | methods.FULL_CHR_H_INP
    same = dict(src_colorspace=matrix, dst_colorspace=matrix, interpolation=exact)
    pixels = frame.to_ndarray(format="rgb24", src_color_range=frame.color_range, dst_color_range=full, **same)
    pixels = np.ascontiguousarray(pixels[:, ::-1]) if _is_mirrored(frame) else pixels
    changed = av.VideoFrame.from_ndarray(change(pixels), format="rgb24")
    changed = changed.reformat(format=encoder.pix_fmt, src_color_range=full, dst_color_range=encoder.color_range, **same)
    for name in ("pts", "time_base", "duration"):
        setattr(changed, name, getattr(frame, name))
    return changed
