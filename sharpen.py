"""Sharpens photos with a trained network.

    python sharpen.py photo.jpg holiday/               writes sharpened/photo.jpg, and holiday's photos beside it
    python sharpen.py soft.png -o better.png
    python sharpen.py soft.mp4 -o better.mp4           with its sound; needs pip install -r requirements-extras.txt
    producer | python sharpen.py --frames 1280x720 | consumer          raw RGB frames, 3 bytes a pixel

Sizes, formats, 16 bits, transparency, frames, EXIF and color profiles are kept, and no input is ever overwritten.
"""

import contextlib
import glob
import os
import sys
import time
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cli import CliParser, check_writable, image_size, is_out_of_memory, run_cli, whole_number
from idle_cores import ALL_THREADS, use_idle_cores
from images.photos import FORMATS, find_photos, look_ahead
from images.pictures import read_picture, write_picture
from images.videos import VIDEO_FORMATS, map_frames
from inference import Sharpener, VideoSharpener
from models import load_model
from utils import UserError, one_line, pick_device

WEIGHTS = "best_student_model.pth"  # from train.py; if it does not exist, the shipped student
SHIPPED = Path(__file__).resolve().parent / "weights" / "student.pth"
OUT = "sharpened"  # folder
STRENGTH = 1.0  # 0 is the input, 1 the network's output; more exaggerates
MAX_STRENGTH = 2.0
DEVICE = "auto"  # CUDA or Apple's GPU if available; or "cpu", "cuda:1", ...
SMALL = 3_000_000  # values of a picture, three per pixel: below, a student on one core is as fast as on all


def main() -> None:
    parser = CliParser(__doc__)
    parser.add_argument("inputs", nargs="*", type=Path, metavar="INPUT", help="photos, videos, and folders of photos")
    parser.add_argument("-o", "--out", default=OUT, help=f"a folder, or for one input a file ({OUT})")
    parser.add_argument("--weights", type=Path, help=f"of a student or teacher ({WEIGHTS}, else {SHIPPED.parent.name}/)")
    parser.add_argument("--strength", type=float, default=STRENGTH, help=f"0 (input) to {MAX_STRENGTH}, 1 is as trained")
    parser.add_argument("--orientations", type=whole_number(1, 8), default=1, help="flips, rotations to average: 1 to 8")
    parser.add_argument("--device", default=DEVICE, help="auto, cpu, cuda, ...")
    parser.add_argument("--overwrite", action="store_true", help="replace existing results")
    parser.add_argument("--frames", type=image_size, metavar="WIDTHxHEIGHT", help="raw RGB frames from stdin to stdout")
    options = parser.parse_args()
    if not 0 <= options.strength <= MAX_STRENGTH:
        raise UserError(f"--strength {options.strength} must be between 0 (the input) and {MAX_STRENGTH}")
    if bool(options.inputs) == bool(options.frames):
        raise UserError("name photos, videos or folders to sharpen, or --frames WIDTHxHEIGHT for a pipe, not both")
    if options.frames and options.out != OUT:
        raise UserError("--frames writes to standard output: leave out -o, and send the output to a file or a program")
    jobs, problems = find_jobs(options.inputs, options.out, options.overwrite) if options.inputs else ({}, [])
    for result in list(jobs)[:1]:
        check_writable(result.parent, "-o")
    weights = options.weights or (Path(WEIGHTS) if os.path.isfile(WEIGHTS) else SHIPPED)
    device = pick_device(options.device, "--device")
    use_idle_cores()
    network = load_model(weights).requires_grad_(False)
    sharpener = Sharpener(network, device, orientations=options.orientations, strength=options.strength)
    if options.frames:
        sharpen_frames(sharpener, *options.frames)
    else:
        sharpen_files(sharpener, jobs, problems, weights)


def find_jobs(inputs: list[Path], out: str, overwrite: bool) -> tuple[dict[Path, Path], list[str]]:
    """Result -> photo for each photo to sharpen, and a sentence for each that cannot be; what is left out is printed.

    ``out`` is a folder if it ends in a separator, which a ``Path`` would not keep.
    """
    is_folder, out = out.endswith(("/", os.sep)) or os.path.isdir(out), Path(out)
    # Some shells leave patterns as they are
    inputs = [Path(p) for path in inputs for p in (not os.path.lexists(path) and sorted(glob.glob(str(path)))) or [path]]
    # A suffix of digits is a date or a version
    one_file = bool(out.suffix.strip(".0123456789-_")) and not is_folder and not any(map(os.path.isdir, inputs))
    if one_file and len(inputs) > 1:
        raise UserError(f"-o {out} is one file: name a folder for the results of {len(inputs)} inputs")
    found, problems = [], []
    for path in inputs:
        if os.path.isdir(path):
            try:
                found += [(photo, out / photo.relative_to(path)) for photo in find_photos(path, problems, [out])]
            except UserError as error:
                problems.append(str(error))
        elif os.path.isfile(path):
            found.append((path, out if one_file else out / path.name))
        else:
            problems.append(f"{path} is missing or not a file: name photos, videos and folders")
    jobs, there = {}, 0
    sources = {name for photo, _ in found for name in (real_name(photo), file_id(photo))} - {None}
    first: dict[str, Path] = {}  # real result -> photo
    for photo, result in found:
        twin = first.setdefault(real_name(result), photo)
        wanted = FORMATS if photo.suffix.lower() in FORMATS else FORMATS | VIDEO_FORMATS
        if sources & {real_name(result), file_id(result)}:
            problems.append(f"{photo} would be sharpened into {result}, which is an input: choose another folder with -o")
        elif real_name(twin) != real_name(photo):
            problems.append(f"{photo} and {twin} would both become {result}: sharpen one at a time")
        elif twin is not photo:
            continue  # named twice
        elif result.suffix.lower() not in wanted:
            problems.append(f"{photo} would become {result}, which does not end in one of {', '.join(wanted)}")
        elif overwrite or not os.path.lexists(result):
            jobs[result] = photo
        elif one_file or not os.path.isfile(result):
            problems.append(f"{result} exists already: move it, or allow --overwrite")
        else:
            there += 1
    if there:
        print(f"{there} of the results exist already: --overwrite makes them again")
    return jobs, problems


def real_name(path: Path) -> str:
    """The same for one file, whatever links lead to it, and on Windows and macOS in whatever case."""
    real = os.path.realpath(path)  # unlike Path.resolve it accepts broken and circular links
    return real.casefold() if sys.platform in ("win32", "darwin") else real


def file_id(path: Path) -> tuple[int, int] | None:
    """Device and inode, the same for all names of a file, also in another case where that is ignored; None if missing."""
    with contextlib.suppress(OSError):
        status = os.stat(path)
        return status.st_dev, status.st_ino


def sharpen_files(sharpener: Sharpener, jobs: dict[Path, Path], problems: list[str], weights: Path) -> None:
    """Sharpen each photo or video. Failures are reported, the others are still sharpened, and the exit code is then 1.

    Photos before and after the one that is being sharpened are decoded and encoded in threads meanwhile.
    """
    done, start = 0, time.perf_counter()
    for problem in problems:
        print(f"error: {one_line(problem)}", file=sys.stderr)
    threads = min(4, os.cpu_count() or 1)  # as many photos wait before and after the network, which bounds the memory
    with ThreadPoolExecutor(threads) as pool, tqdm(total=len(jobs), unit="file", leave=False, disable=None) as bar:
        reads = (
            None if result.suffix.lower() in VIDEO_FORMATS else pool.submit(read_picture, photo)
            for result, photo in jobs.items()
        )
        work = zip(jobs.items(), look_ahead(reads, threads), strict=True)
        written = (sharpen_job(pool, photo, result, read, sharpener) for (result, photo), read in work)
        for (result, photo), job in zip(jobs.items(), look_ahead(written, threads), strict=True):
            bar.update()
            error = job.exception()
            if is_out_of_memory(error):
                error = f"{photo} does not fit in memory: lower TILE in inference.py, or on a GPU use --device cpu"
            if isinstance(error, (UserError, str)):
                tqdm.write(f"error: {one_line(str(error))}", file=sys.stderr)
                continue
            done += 1
            if notes := job.result():  # or raises the error, which is a bug
                tqdm.write(one_line(f"{result}: {', '.join(notes)}"))
    total, seconds = len(jobs) + len(problems), time.perf_counter() - start
    print(f"{done} of {total} files sharpened with {weights}, in {seconds:.1f} seconds on {sharpener.device}")
    if done < total:
        raise SystemExit(1)


def sharpen_job(pool: Executor, photo: Path, result: Path, read: Future | None, sharpener: Sharpener) -> Future:
    """Sharpen the picture that is ``read`` and write it in ``pool``, or the video if that is None; gives its notes."""
    try:
        video = VideoSharpener(sharpener)
        torch.set_num_threads(ALL_THREADS)
        if read is None:
            notes = map_frames(photo, result, lambda frame: sharpen_frame(video, frame))
            return pool.submit(lambda: notes)  # as from write_picture
        picture = read.result()
        use_idle_cores()
        if sharpener.fused and picture.pixels.size < SMALL:
            torch.set_num_threads(1)  # as fast, and others are free to read and write
        pixels = picture.pixels if picture.alpha is None else fill_hidden(picture.pixels, picture.alpha)
        sharpened = np.stack([sharpen_frame(video, each) for each in pixels]) if pixels.ndim == 4 else sharpener(pixels)
        picture.pixels = sharpened if picture.alpha is None else np.where(picture.alpha > 0, sharpened, picture.pixels)
        return pool.submit(write_picture, result, picture)
    except Exception as error:  # sharpen_files reports it in the order of the files
        failed = Future()
        failed.set_exception(error)
        return failed


def sharpen_frame(video: VideoSharpener, frame: np.ndarray) -> np.ndarray:
    use_idle_cores()
    return video(frame)


def fill_hidden(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """(..., H, W, C) with the nearest visible color where ``alpha`` is 0: what lies hidden there is often black or white,
    and filters would draw it into what is visible beside it."""
    if pixels.ndim == 4:
        return np.stack([fill_hidden(*frame) for frame in zip(pixels, alpha, strict=True)])
    visible = alpha[..., 0] > 0
    if visible.all() or not visible.any():
        return pixels
    from scipy.ndimage import distance_transform_edt  # comes with scikit-image; takes a while to import

    rows, columns = distance_transform_edt(~visible, return_distances=False, return_indices=True)
    return pixels[rows, columns]


def sharpen_frames(sharpener: Sharpener, height: int, width: int) -> None:
    """Sharpen rgb24 frames, 3 bytes a pixel, from standard input to standard output until they end."""
    if sys.stdin is None or sys.stdout is None:
        raise UserError("--frames reads standard input and writes standard output: one of them is closed")
    video = VideoSharpener(sharpener)
    frame, count, start = np.empty((height, width, 3), np.uint8), 0, time.perf_counter()
    with tqdm(desc="sharpening", unit="frame", leave=False, disable=None) as bar:
        while got := sys.stdin.buffer.readinto(frame):  # less than a frame only at the end
            if got < frame.size:
                raise UserError(f"the last frame ends after {got} of {frame.size} bytes: is it {width}x{height}, rgb24?")
            sys.stdout.buffer.write(sharpen_frame(video, frame).data)
            count += 1
            bar.update()
        sys.stdout.buffer.flush()
    if not count:
        raise UserError("no frames came in: check whether the program before it failed")
    rate = count / (time.perf_counter() - start)
    print(f"{count} frames sharpened, {rate:.1f} per second on {sharpener.device}", file=sys.stderr)


if __name__ == "__main__":
    run_cli(main)
