"""Video clips: each frame is changed, all else is kept. Needs PyAV (``pip install av``)."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from images.files import atomic_write
from images.photos import describe_error
from utils import UserError

CLIPS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}  # PyAV's names of the formats
QUALITY = {"crf": "16", "preset": "medium"}  # of H.264; one sees no difference


def change_clip(clip: Path, result: Path, change: Callable[[np.ndarray], np.ndarray]) -> int:
    """Write ``clip`` with ``change(frame)`` in place of each frame, (H, W, 3) uint8 RGB; returns the number of frames.

    Frames keep their times, also of a variable rate, and their size, rotation, pixel shape, color matrix and range. They are
    encoded as H.264. Sound and subtitles are copied as they are. ``result`` is written whole or not at all.

    Raises:
        UserError: if PyAV is not installed, if the clip cannot be read completely or written, or if it is interlaced, has
            more than 8 bits or no frames.
    """
    try:
        import av
    except ImportError:
        raise UserError(f"{clip} is a video: install PyAV to sharpen videos, pip install av") from None
    if not clip.is_file():
        raise UserError(f"{clip} is missing")
    count = 0

    def write(partial: Path) -> None:
        nonlocal count
        with av.open(str(clip)) as source, av.open(str(partial), "w", format=CLIPS[result.suffix.lower()]) as target:
            count = _change_frames(av, source, target, change)

    try:
        _check(av, clip)
        atomic_write(result, write)
    except av.error.FFmpegError as error:  # some are an OSError, too
        raise UserError(
            f"{clip} cannot be sharpened as a video ({describe_error(error)}): convert it to MP4 first"
        ) from None
    return count


def _check(av, clip: Path) -> None:
    with av.open(str(clip)) as source:
        if not source.streams.video:
            raise UserError(f"{clip} contains no video")
        frame = next(source.decode(video=0), None)
    if frame is None:
        raise UserError(f"{clip} contains no frames")
    bits = max(component.bits for component in frame.format.components)
    if bits > 8:
        raise UserError(f"{clip} has {bits} bits per color: convert it to 8 bits first")
    if frame.interlaced_frame:
        raise UserError(f"{clip} is interlaced: deinterlace it first")


def _change_frames(av, source, target, change: Callable[[np.ndarray], np.ndarray]) -> int:
    video, encoder, packets, count = source.streams.video[0], None, 0, 0
    video.thread_type = "AUTO"  # decode on all cores
    others = [stream for stream in source.streams if stream.type in ("audio", "subtitle")]
    written, waiting = target.add_stream("libx264", rate=video.average_rate, options=QUALITY), []
    copies = {stream.index: target.add_stream_from_template(stream) for stream in others}
    with tqdm(desc="sharpening", total=video.frames or None, unit="frame", leave=False, disable=None) as bar:
        for packet in source.demux(video, *others):
            if packet.stream.index != video.index:
                if packet.dts is not None:  # None: the end of the stream
                    packet.stream = copies[packet.stream.index]
                    waiting.append(packet)
            else:
                packets += packet.size > 0
                for frame in packet.decode():
                    if encoder is None:
                        encoder = _configure(written, video, frame)
                    target.mux(encoder.encode(_changed(av, frame, encoder.pix_fmt, change)))
                    count += 1
                    bar.update()
            if encoder:  # the header is written with the first packet, and needs to know the frames
                for each in waiting:
                    target.mux(each)
                waiting = []
        target.mux(encoder.encode(None))
    if packets < video.frames:
        raise UserError(f"{source.name} ends after {packets} of {video.frames} frames: it is damaged")
    return count


def _configure(written, video, frame):
    """The encoder of the stream ``written``, with what is known of ``video`` and its first frame."""
    encoder = written.codec_context
    encoder.width, encoder.height, encoder.time_base = frame.width, frame.height, video.time_base
    even = frame.width % 2 == 0 and frame.height % 2 == 0  # chroma of half the size needs that
    same = frame.format.name in ("yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p")
    encoder.pix_fmt = frame.format.name if same and even else "yuv420p" if even else "yuv444p"
    if video.sample_aspect_ratio:
        encoder.sample_aspect_ratio = video.sample_aspect_ratio
    for name in "colorspace", "color_range", "color_primaries", "color_trc":
        setattr(encoder, name, getattr(frame, name))
    if frame.rotation:
        written.set_display_rotation(frame.rotation)
    return encoder


def _changed(av, frame, pix_fmt: str, change: Callable[[np.ndarray], np.ndarray]):
    """The frame with changed pixels, converted to RGB and back with its own matrix and range."""
    matrix = frame.colorspace if frame.colorspace in set(av.video.reformatter.Colorspace) else None
    full, methods = av.video.reformatter.ColorRange.JPEG, av.video.reformatter.Interpolation
    converter = av.video.reformatter.VideoReformatter()
    # Without these flags each frame becomes darker by a gray level
    exact = methods.BICUBIC | methods.ACCURATE_RND | methods.FULL_CHR_H_INT | methods.FULL_CHR_H_INP
    yuv = dict(src_colorspace=matrix, dst_colorspace=matrix, interpolation=exact)
    pixels = converter.reformat(frame, format="rgb24", src_color_range=frame.color_range, dst_color_range=full, **yuv)
    changed = av.VideoFrame.from_ndarray(change(pixels.to_ndarray()), format="rgb24")
    changed = converter.reformat(changed, format=pix_fmt, src_color_range=full, dst_color_range=frame.color_range, **yuv)
    changed.pts, changed.time_base, changed.duration = frame.pts, frame.time_base, frame.duration
    for name in "colorspace", "color_range", "color_primaries", "color_trc":
        setattr(changed, name, getattr(frame, name))
    return changed
