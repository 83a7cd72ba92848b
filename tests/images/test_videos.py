"""Videos: each frame once and at its own time, and all else as it was."""

import struct
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from conftest import dummy_photo

from images.videos import _has_finer_colors, map_frames
from utils import UserError


@pytest.fixture
def av():
    return pytest.importorskip("av")


def write_clip(av, path, times, size=(64, 96), rotation=0, matrix=1, full_range=False, pixel_shape=None, **more):
    """Frames of a photo that moves, at ``times`` in ticks of 1 / 90000 s, with a second of sound."""
    codec, pix_fmt, metadata = more.get("sound", "aac"), more.get("pix_fmt", "yuv420p"), more.get("metadata", {})
    with av.open(str(path), "w", options={"movflags": "use_metadata_tags"} if metadata else {}) as target:
        target.metadata.update(metadata)
        video, sound = target.add_stream("libx264", rate=30, options={"crf": "5"}), target.add_stream(codec, rate=8000)
        video.codec_context.thread_count = 1  # else the pixels depend on the number of cores
        video.height, video.width, video.pix_fmt = *size, pix_fmt
        video.codec_context.time_base, sound.layout = Fraction(1, 90000), "mono"
        video.codec_context.colorspace, video.codec_context.color_range = matrix, 1 + full_range
        if pixel_shape:
            video.codec_context.sample_aspect_ratio = pixel_shape
        if rotation:
            video.set_display_rotation(rotation)
        colors = dict(dst_colorspace=matrix, dst_color_range=1 + full_range)
        for k, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.roll(smooth_photo(*size), 2 * k, 1), format="rgb24")
            frame = av.video.reformatter.VideoReformatter().reformat(frame, format=pix_fmt, **colors)
            frame.pts, frame.time_base = time, Fraction(1, 90000)
            target.mux(video.encode(frame))
        target.mux(video.encode(None))
        waves = (8000 * np.sin(np.arange(8000) / 5)).astype(np.int16)
        for start in range(0, 8000, 1024):
            samples = av.AudioFrame.from_ndarray(waves[None, start : start + 1024], format="s16", layout="mono")
            samples.sample_rate, samples.pts, samples.time_base = 8000, start, Fraction(1, 8000)
            target.mux(sound.encode(samples))
        target.mux(sound.encode(None))


def smooth_photo(height, width):
    return np.kron(dummy_photo(height // 8, width // 8, seed=3), np.ones((8, 8, 1), np.uint8)) // 2 + 60


def read_clip(av, path):
    """Times in seconds, pixels and properties of the frames, and the bytes of the sound's packets."""
    with av.open(str(path)) as source:
        frames = list(source.decode(video=0))
        shape = source.streams.video[0].sample_aspect_ratio
    with av.open(str(path)) as source:
        packets = [bytes(packet) for packet in source.demux(audio=0)]
    times = [frame.pts * frame.time_base for frame in frames]
    properties = {(f.width, f.height, f.format.name, f.rotation, f.colorspace, f.color_range, shape) for f in frames}
    return times, [frame.to_ndarray() for frame in frames], properties, packets


STEADY, VARIABLE = range(0, 30000, 3000), [0, 2000, 7003, 7100, 15000, 30001]


@pytest.mark.parametrize(
    "options",
    [
        dict(times=STEADY),
        dict(times=VARIABLE, rotation=90),
        dict(times=VARIABLE, matrix=5, full_range=True),
        dict(times=STEADY, pixel_shape=Fraction(4, 3), pix_fmt="yuv444p", size=(64, 104)),
    ],
    ids=["steady", "from a phone", "full range", "wide pixels"],
)
def test_each_frame_is_kept_at_its_time_with_its_properties_and_the_sound(av, tmp_path, options):
    write_clip(av, tmp_path / "a.mp4", **options)
    map_frames(tmp_path / "a.mp4", tmp_path / "b.mp4", lambda frame: frame)
    before, after = (read_clip(av, tmp_path / name) for name in ("a.mp4", "b.mp4"))
    assert after[0] == before[0] == [Fraction(t, 90000) for t in options["times"]]
    assert after[2] == before[2] and after[3] == before[3] and len(after[3]) > 5
    differences = [other.astype(float) - one for one, other in zip(before[1], after[1], strict=True)]
    assert all(np.abs(difference).mean() < 0.6 for difference in differences), "matrix and range are those of the clip"
    assert abs(np.mean(differences)) < 0.3, "in full range libswscale rounds chroma down, by half a gray level"


def test_the_last_frame_of_slides_stays_as_long_as_before(av, tmp_path):
    write_clip(av, tmp_path / "a.mp4", [0, 90000, 180000])
    with av.open(str(tmp_path / "a.mp4")) as source, av.open(str(tmp_path / "b.mp4"), "w") as target:
        copy = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.duration = round((8 if packet.pts * packet.time_base == 2 else 1) / packet.time_base)
                packet.stream = copy
                target.mux(packet)
    map_frames(tmp_path / "b.mp4", tmp_path / "c.mp4", lambda frame: frame)
    for name in "b.mp4", "c.mp4":
        with av.open(str(tmp_path / name)) as found:
            assert found.duration == 10_000_000, "microseconds"


def test_frames_are_changed_in_order_as_rgb(av, tmp_path):
    write_clip(av, tmp_path / "a.mp4", STEADY)
    seen = []
    map_frames(tmp_path / "a.mp4", tmp_path / "b.mkv", lambda frame: seen.append(frame) or 255 - frame)
    assert all(frame.shape == (64, 96, 3) and frame.dtype == np.uint8 for frame in seen)
    for k, frame in enumerate(seen):
        assert np.abs(frame.astype(float) - np.roll(smooth_photo(64, 96), 2 * k, 1)).mean() < 6
    inverted = []
    map_frames(tmp_path / "b.mkv", tmp_path / "c.mp4", lambda frame: inverted.append(frame) or frame)
    assert np.abs(np.stack(seen).astype(float) + np.stack(inverted) - 255).mean() < 6


def test_what_cannot_be_changed_is_one_sentence_and_leaves_nothing_behind(av, tmp_path):
    write_clip(av, tmp_path / "good.mp4", STEADY)
    write_clip(av, tmp_path / "deep.mp4", STEADY, pix_fmt="yuv420p10le")
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "good.mp4").read_bytes()[:-2000])
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "list.mp4").write_text(f"ffconcat version 1.0\nfile '{tmp_path}/good.mp4'\n")
    said = {
        "deep": "10 bits",
        "cut": "cannot be sharpened as a video",
        "empty": "cannot be",
        "list": "cannot be",
        "none": "is missing",
    }
    for name, sentence in said.items():
        with pytest.raises(UserError, match=rf"{name}\.mp4 .*{sentence}"):
            map_frames(tmp_path / f"{name}.mp4", tmp_path / "result.mp4", lambda frame: frame)

    def stop(frame):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        map_frames(tmp_path / "good.mp4", tmp_path / "result.mp4", stop)
    assert {path.name for path in tmp_path.iterdir()} == {"good.mp4", "deep.mp4", "cut.mp4", "empty.mp4", "list.mp4"}


def test_sound_that_does_not_fit_is_told_with_what_to_do_and_unknown_sound_is_left_out_and_told(av, tmp_path):
    write_clip(av, tmp_path / "a.mkv", STEADY, sound="pcm_u8")
    with pytest.raises(UserError, match=r"a.mkv has pcm_u8 sound, which .mp4 cannot hold: choose .mkv with -o"):
        map_frames(tmp_path / "a.mkv", tmp_path / "b.mp4", lambda frame: frame)
    assert map_frames(tmp_path / "a.mkv", tmp_path / "b.mkv", lambda frame: frame) == []
    write_clip(av, tmp_path / "c.mov", STEADY)
    content = (tmp_path / "c.mov").read_bytes().replace(b"mp4a", b"apac").replace(b"esds", b"dapa")
    (tmp_path / "c.mov").write_bytes(content)
    assert map_frames(tmp_path / "c.mov", tmp_path / "d.mov", lambda frame: frame) == ["without 1 other audio stream"]


CAPTIONS = b"\0\0\1\x06\x04\x0e\xb5\x00\x31GA94\x03\x41\xff\xfc\x14\x2c\xff\x80"  # of one frame in H.264


def write_parts(av, path, *parts, captions=b""):
    """Parts of (times in ticks of 1 / 90000 s, size, options of the encoder), one after the other in one stream."""
    with av.open(str(path), "w") as target:
        stream = None
        for times, size, options in parts:
            encoder = av.CodecContext.create("libx264", "w")
            encoder.height, encoder.width, encoder.pix_fmt, encoder.time_base = *size, "yuv420p", Fraction(1, 90000)
            encoder.framerate, encoder.options = 30, {"bf": "0", **options}
            if stream is None:
                stream = target.add_stream("libx264", rate=30)
                stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
            frames = [
                av.VideoFrame.from_ndarray(smooth_photo(*size), format="rgb24").reformat(format="yuv420p") for _ in times
            ]
            packets = [packet for frame in frames for packet in encoder.encode(frame)] + encoder.encode(None)
            for time, packet in zip(times, packets, strict=True):
                if captions and time == times[0]:
                    place = bytes(packet).index(b"\0\0\1\x65")  # the pixels
                    packet = av.Packet(bytes(packet)[:place] + captions + bytes(packet)[place:])
                packet.pts = packet.dts = time
                packet.duration, packet.time_base, packet.stream = 3000, Fraction(1, 90000), stream
                target.mux(packet)


@pytest.mark.parametrize(
    "size, options, sentence",
    [
        ((48, 64), {}, r"a\.ts changes to 64x48 after 0.2 seconds: cut it there first"),
        ((64, 96), {"flags": "+ilme+ildct", "x264-params": "tff=1"}, r"a\.ts is interlaced"),
    ],
)
def test_a_video_that_changes_on_its_way_is_one_sentence(av, tmp_path, size, options, sentence):
    write_parts(av, tmp_path / "a.ts", (range(3000, 18000, 3000), (64, 96), {}), (range(18000, 33000, 3000), size, options))
    with pytest.raises(UserError, match=rf"^{tmp_path}/{sentence}"):
        map_frames(tmp_path / "a.ts", tmp_path / "b.mkv", lambda frame: frame)
    assert not (tmp_path / "b.mkv").exists()


def test_frames_with_one_time_are_shown_one_after_the_other(av, tmp_path):
    write_parts(av, tmp_path / "a.mkv", ([0, 3600, 7200, 7200, 18000], (64, 96), {}))
    map_frames(tmp_path / "a.mkv", tmp_path / "b.mkv", lambda frame: frame)
    with av.open(str(tmp_path / "b.mkv")) as found:
        assert [round(1000 * frame.time) for frame in found.decode(video=0)] == [0, 40, 80, 113, 200]


@pytest.mark.parametrize("name, share", [("b.mp4", 0.5), ("b.mp4", 0.9), ("b.mkv", 0.5)])
def test_a_video_that_was_cut_off_is_an_error_and_the_rest_is_written(av, tmp_path, name, share):
    write_clip(av, tmp_path / "a.mp4", range(0, 3 * 90000, 9000))
    options = {"movflags": "faststart"} if name == "b.mp4" else {}
    with av.open(str(tmp_path / "a.mp4")) as source, av.open(str(tmp_path / name), "w", options=options) as target:
        copies = {stream.index: target.add_stream_from_template(stream) for stream in source.streams}
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = copies[packet.stream.index]
                target.mux(packet)
    assert map_frames(tmp_path / name, tmp_path / "whole.mp4", lambda frame: frame) == []
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UserError, match=f"/{name} is damaged or was cut off: .*rest.mp4 holds what could be read; copy"):
        map_frames(tmp_path / name, tmp_path / "rest.mp4", lambda frame: frame)
    assert 2 < len(read_clip(av, tmp_path / "rest.mp4")[0]) < 30


def test_titles_languages_and_chapters_are_kept_and_a_name_may_hold_a_colon(av, tmp_path):
    write_clip(av, tmp_path / "a:b.mp4", STEADY)
    with av.open(f"file:{tmp_path / 'a:b.mp4'}") as source, av.open(str(tmp_path / "named.mp4"), "w") as target:
        target.metadata["title"] = "Holiday"
        copies = {stream.index: target.add_stream_from_template(stream) for stream in source.streams}
        copies[1].metadata["language"], copies[1].disposition = "fra", av.stream.Disposition.comment
        chapter = dict(id=1, start=0, end=500, time_base=Fraction(1, 1000), metadata={"title": "One"})
        target.set_chapters([chapter])
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = copies[packet.stream.index]
                target.mux(packet)
    assert map_frames(tmp_path / "named.mp4", tmp_path / "c:d.mp4", lambda frame: frame) == []
    with av.open(f"file:{tmp_path / 'c:d.mp4'}") as found, av.open(str(tmp_path / "named.mp4")) as before:
        assert found.metadata["title"] == "Holiday" and found.streams.audio[0].metadata["language"] == "fra"
        assert found.streams.audio[0].disposition == before.streams.audio[0].disposition != 0
        assert [each["metadata"]["title"] for each in found.chapters()] == ["One"]


@pytest.mark.parametrize("suffix", ["mp4", "mov"])
def test_place_and_camera_of_a_phone_are_kept_and_the_kind_of_file_is_the_result_s(av, tmp_path, suffix):
    apple = {"com.apple.quicktime.location.ISO6709": "+48.1+011.5/", "com.apple.quicktime.make": "Apple"}
    android = {"com.android.capture.fps": "240.0", "make": "Google", "model": "Pixel", "title": "Holiday"}
    for name, wanted in ("a.mov", apple), ("a.mp4", android):
        write_clip(av, tmp_path / name, STEADY, metadata=wanted, rotation=90)
        map_frames(tmp_path / name, tmp_path / f"b.{suffix}", lambda frame: frame)
        with av.open(str(tmp_path / f"b.{suffix}")) as found:
            assert wanted.items() <= found.metadata.items() and next(found.decode(video=0)).rotation == 90
            assert found.metadata["major_brand"] == {"mp4": "isom", "mov": "qt  "}[suffix]


@pytest.mark.parametrize("matrix", [(-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0)], ids=["mirror", "upside down", "transposed"])
def test_a_mirrored_video_looks_as_before(av, tmp_path, matrix):
    def shown(path):
        with av.open(str(path)) as source:
            frame = next(source.decode(video=0))
        a, b, _, c, d = np.frombuffer(bytes(frame.side_data.get("DISPLAYMATRIX") or bytes(36)), np.int32)[:5] / 2**16
        pixels = frame.to_ndarray(format="rgb24").astype(float)
        if b or c:
            pixels, (a, d) = pixels.swapaxes(0, 1), (c, b)
        return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]

    write_clip(av, tmp_path / "a.mp4", STEADY)
    content = bytearray((tmp_path / "a.mp4").read_bytes())
    place = content.index(struct.pack(">5i", 2**16, 0, 0, 0, 2**16), content.index(b"tkhd"))
    a, b, c, d = (2**16 * each for each in matrix)
    struct.pack_into(">5i", content, place, a, b, 0, c, d)
    (tmp_path / "a.mp4").write_bytes(content)
    map_frames(tmp_path / "a.mp4", tmp_path / "b.mp4", lambda frame: frame)
    assert np.abs(shown(tmp_path / "b.mp4") - shown(tmp_path / "a.mp4")).mean() < 2


def test_rgb_gets_a_color_matrix_and_lost_transparency_is_told(av, tmp_path):
    photo = np.dstack([smooth_photo(64, 96), np.full((64, 96), 255, np.uint8)])
    with av.open(str(tmp_path / "a.mkv"), "w") as target:
        video = target.add_stream("ffv1", rate=30)
        video.height, video.width, video.pix_fmt = 64, 96, "bgra"
        for packet in (*video.encode(av.VideoFrame.from_ndarray(photo, format="rgba")), *video.encode(None)):
            target.mux(packet)
    notes = ["without its transparency", "its colors at half the resolution"]
    assert map_frames(tmp_path / "a.mkv", tmp_path / "b.mkv", lambda frame: frame) == notes
    with av.open(str(tmp_path / "b.mkv")) as found:
        frame = next(found.decode(video=0))
    assert frame.format.name == "yuv420p" and frame.colorspace == 1
    pixels = frame.to_ndarray(format="rgb24", src_colorspace=1, src_color_range=frame.color_range)
    assert np.abs(pixels.astype(float) - photo[..., :3]).mean() < 6


def test_colors_are_finer_in_what_has_chroma_of_a_higher_resolution(av):
    finer = {"yuv420p": 0, "nv12": 0, "gray": 0, "yuv410p": 0}
    finer |= dict.fromkeys(("gbrp", "yuv444p", "yuv440p", "yuv411p", "yuyv422", "pal8", "nv16", "bgra"), 1)
    assert {name: _has_finer_colors(av.VideoFormat(name), av.VideoFormat("yuv420p")) for name in finer} == finer
    assert not _has_finer_colors(av.VideoFormat("bgra"), av.VideoFormat("yuv444p"))


def test_closed_captions_are_told_as_lost(av, tmp_path):
    write_parts(av, tmp_path / "a.ts", (range(0, 15000, 3000), (64, 96), {}), captions=CAPTIONS)
    assert map_frames(tmp_path / "a.ts", tmp_path / "b.mkv", lambda frame: frame) == ["without its closed captions"]


def test_without_pyav_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match="install PyAV 18 or newer to sharpen it, pip install"):
        map_frames(Path("a.mp4"), tmp_path / "b.mp4", lambda frame: frame)
