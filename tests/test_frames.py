"""Frames from a pipe and videos: sharpened evenly, and anew after a cut."""

import errno
import io
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import changing_network, dummy_photo, texture
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from video import mean_gradient, pan

import sharpen
from blur.camera import add_noise
from blur.filters import convolve, gaussian_kernel
from images.pictures import read_picture
from inference import Sharpener, VideoSharpener
from models import TeacherCNN, load_model, save_model
from utils import to_pixels

CPU = torch.device("cpu")


class Trickle(io.BytesIO):
    """Gives at most 1,000 bytes at a time, as a pipe may."""

    def readinto(self, view):
        return super().readinto(memoryview(view)[:1000])


@pytest.fixture
def pipe(monkeypatch):
    """Puts bytes into standard input; returns what standard output will hold."""

    def pipe(data):
        sink = io.BytesIO()
        monkeypatch.setattr(sys, "stdin", type("", (), {"buffer": io.BufferedReader(Trickle(data), 100)}))
        monkeypatch.setattr(sys, "stdout", type("", (), {"buffer": sink}))
        return sink

    return pipe


def test_frames_go_through_a_pipe_byte_by_byte(run_sharpen, pipe):
    frames = np.stack([dummy_photo(24, 40, seed=k) for k in range(3)])
    sink = pipe(frames.tobytes())
    _, _, errors = run_sharpen("--frames", "40x24")
    video = VideoSharpener(Sharpener(changing_network(), CPU))
    wanted = np.stack([video(frame) for frame in frames])
    assert sink.getvalue() == wanted.tobytes() and "3 frames sharpened" in errors
    assert np.abs(wanted.astype(int) - frames).max() > 10


def test_a_video_is_sharpened_evenly():
    sharpener = Sharpener(load_model(sharpen.SHIPPED), CPU)
    frames, video = list(pan(40, noise=4, quality=80)), VideoSharpener(sharpener)
    steady, single = ([mean_gradient(each(f)) / mean_gradient(f) for f in frames] for each in (video, sharpener))
    jumps, jumps_alone = (np.abs(np.diff(np.log(ratios))).max() for ratios in (steady, single))
    assert jumps < 0.01 < jumps_alone
    assert np.mean(steady) == pytest.approx(np.mean(single), rel=0.02)


def test_no_place_of_a_video_flickers_where_only_a_part_is_sharp():
    sharpener, generator = Sharpener(load_model(sharpen.SHIPPED), CPU), torch.Generator().manual_seed(0)
    scene = texture(192, 256)[0]
    scene[..., 128:] = convolve(scene, gaussian_kernel(2.0))[..., 128:]
    frames = [to_pixels(add_noise(scene, 1.0, generator)) for _ in range(16)]
    flicker = []
    for each in (VideoSharpener(sharpener), sharpener):
        changes = np.stack([np.abs(each(frame).astype(float) - frame) for frame in frames])
        by_cell = changes.reshape(16, 12, 16, 16, 48).mean((2, 4))
        assert by_cell[:, :, 9:].mean() > 5 * by_cell[:, :, :7].mean()
        flicker.append(np.abs(np.diff(by_cell, axis=0)).max())
    assert flicker[0] < 0.5 and flicker[0] < 0.7 * flicker[1]  # gray levels


def test_a_cut_in_a_video_starts_anew_and_the_same_frames_give_the_same_results():
    sharpener = Sharpener(load_model(sharpen.SHIPPED), CPU)
    frames = [*pan(11, noise=4, quality=80), *(dummy_photo(288, 352, seed=k)[::-1] // 2 for k in (5, 5, 5))]
    frames = [np.ascontiguousarray(frame) for frame in frames]
    first, second = ([video(frame) for frame in frames] for video in (VideoSharpener(sharpener), VideoSharpener(sharpener)))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    for k in 0, 11, 12:
        assert np.array_equal(first[k], sharpener(frames[k])), k
    assert not np.array_equal(first[10], sharpener(frames[10])), "the blur is followed"


@pytest.mark.parametrize(
    "sharpener", [Sharpener(changing_network(), CPU), VideoSharpener(Sharpener(changing_network(), CPU))]
)
def test_pixels_that_are_read_only_or_turned_from_bgr_are_as_good(sharpener):
    pixels = dummy_photo(70, 90, seed=4)
    expected = sharpener(pixels)
    assert np.array_equal(sharpener(np.asarray(Image.fromarray(pixels))), expected)
    assert np.array_equal(sharpener(pixels[..., ::-1].copy()[..., ::-1]), expected)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_a_frame_of_another_size_starts_anew(monkeypatch, every):
    monkeypatch.setattr(VideoSharpener, "GAINS_EVERY", every)
    video, frames = VideoSharpener(Sharpener(changing_network(), CPU)), [dummy_photo(48, 64, 1), dummy_photo(64, 48, 1)]
    for frame in frames:
        assert np.array_equal(video(frame), video.sharpener(frame))


def test_frames_can_go_through_a_teacher_too(run_sharpen, tmp_path, pipe):
    frame = dummy_photo(24, 40, seed=1)
    teacher = changing_network(TeacherCNN, width=4, deep_width=8, hidden=[8, 8], fine_blocks=1)
    save_model(tmp_path / "teacher.pth", teacher)
    sink = pipe(frame.tobytes())
    run_sharpen("--frames", "40x24", "--weights", "teacher.pth")
    found = np.frombuffer(sink.getvalue(), np.uint8).reshape(frame.shape)
    assert np.array_equal(found, Sharpener(teacher, CPU)(frame))


@pytest.mark.parametrize(
    ("count", "said"), [(0, "no frames came in"), (24 * 40 * 3 + 5, "ends after 5 of 2880 bytes: is it 40x24, rgb24?")]
)
def test_an_incomplete_or_missing_frame_is_one_sentence(run_sharpen, pipe, count, said):
    pipe(bytes(count))
    code, _, errors = run_sharpen("--frames", "40x24")
    assert code == 1 and errors.startswith("error: ") and said in errors


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left on device")])
def test_a_closed_or_full_output_is_one_sentence(run_sharpen, pipe, monkeypatch, error):
    def fail(data):
        raise error

    sink = pipe(bytes(24 * 40 * 3))
    sink.write, sys.stdout.fileno = fail, lambda: 99
    monkeypatch.setattr(os, "dup2", lambda source, target: None)
    code, _, errors = run_sharpen("--frames", "40x24")
    full = f"failed ({error.strerror}): check disk space and permissions"
    said = "is no longer read: the program after it has ended" if error.errno == errno.EPIPE else full
    assert code == 1 and errors == f"error: the output {said}"


def test_a_video_becomes_a_video_next_to_photos(run_sharpen, tmp_path):
    av = pytest.importorskip("av")
    frames = [np.repeat(np.repeat(dummy_photo(24, 32, seed=k), 2, 0), 2, 1) for k in (1, 1, 1)]
    with av.open(str(tmp_path / "clip.mp4"), "w") as target:
        stream = target.add_stream("libx264", rate=25, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for frame in frames:
            target.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        target.mux(stream.encode(None))
    Image.fromarray(dummy_photo(40, 52, seed=0)).save(tmp_path / "a.png")
    code, printed, errors = run_sharpen("clip.mp4", "a.png")
    assert (code, errors) == (0, "") and "2 of 2 files sharpened" in printed
    before, after = (
        [frame.to_ndarray(format="rgb24") for frame in av.open(str(path)).decode(video=0)]
        for path in (tmp_path / "clip.mp4", tmp_path / "sharpened" / "clip.mp4")
    )
    video = VideoSharpener(Sharpener(changing_network(), CPU))
    for one, other in zip(before, after, strict=True):
        assert np.abs(video(one).astype(float) - other).mean() < 0.7 * np.abs(other.astype(float) - one).mean()
    assert "a.png would become a.mp4" in run_sharpen("a.png", "-o", "a.mp4")[2]


def test_an_animation_is_sharpened_as_a_video_is(run_sharpen, tmp_path):
    frames = [np.roll(dummy_photo(40, 52, seed=1), k, 1) for k in range(3)]
    first, *more = map(Image.fromarray, frames)
    first.save(tmp_path / "a.png", save_all=True, append_images=more, duration=[100, 200, 300])
    assert run_sharpen("a.png")[0] == 0
    result = read_picture(tmp_path / "sharpened/a.png")
    video = VideoSharpener(Sharpener(changing_network(), torch.device("cpu")))
    assert np.array_equal(result.pixels, [video(frame) for frame in frames])
    assert result.options["duration"] == [100, 200, 300]
