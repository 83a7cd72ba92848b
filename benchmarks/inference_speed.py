"""How long one 1920x1080 frame takes, from 8-bit pixels in memory to 8-bit pixels in memory.

    python benchmarks/inference_speed.py
    python benchmarks/inference_speed.py --threads 1 --size 3840x2160
    python benchmarks/inference_speed.py --beside 1   beside a busy program, on the cores that sharpen.py takes

Each method processes some frames one after another, as in a video, in three rounds. "Convolutions alone" are those of the
fused student on tensors that are already there: the limit. Untrained networks are as fast as trained ones, which smooth
chroma, however, where they expect noise: a row of its own. Of "student, video" the mean is printed, not the median. Close
other programs first.
"""

import copy
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import skimage
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from cli import CliParser, image_size, run_cli, whole_number
from fused_student import FusedStudent
from idle_cores import use_idle_cores
from inference import Sharpener, VideoSharpener
from models import StudentCNN, TeacherCNN
from utils import count_parameters, gmac_per_megapixel, pick_device

ROUNDS = 3
SLOW = {"teacher", "scipy Gaussian unsharp mask", "student, float32"}


def main() -> None:
    parser = CliParser(__doc__)
    parser.add_argument("--size", type=image_size, default="1920x1080", help="WIDTHxHEIGHT of the frame")
    parser.add_argument("--threads", type=whole_number(1, 1024), help="of torch on the CPU; all cores, if not given")
    parser.add_argument("--rounds", type=whole_number(1), default=15, help="frames of each method in each round")
    parser.add_argument("--slow-rounds", type=whole_number(1), default=2, help="the same for what takes seconds on a CPU")
    parser.add_argument("--beside", type=whole_number(1, 1024), default=0, help="other processes that keep a core busy each")
    options = parser.parse_args()
    height, width = options.size
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(options.beside)]
    try:
        time.sleep(0.5 * options.beside)  # seconds, until they run
        if options.threads:
            torch.set_num_threads(options.threads)
        else:
            use_idle_cores()
        device = pick_device()
        sizes = [(height, width)] if device.type == "cpu" else [(height, width), (2160, 3840)]
        print(f"torch {torch.__version__} on {device}, {torch.get_num_threads()} threads")
        for size in sizes:
            measure(*size, device, options.rounds, options.slow_rounds)
    finally:
        for other in others:
            other.kill()


def measure(height: int, width: int, device: torch.device, rounds: int, slow_rounds: int) -> None:
    frame = example_frame(height, width)
    torch.manual_seed(0)
    student, teacher = (kind().eval().requires_grad_(False).to(device) for kind in (StudentCNN, TeacherCNN))
    nn.init.normal_(student.convs[-1].base.weight, std=0.05)
    for network in student, teacher:
        network.to(memory_format=torch.channels_last)
    fused, plain = FusedStudent(student), FusedStudent(student, torch.float32)
    smoothing = FusedStudent(copy.deepcopy(student))
    nn.init.constant_(smoothing.student.chroma_head.bias, 200.0)
    picture, pillow = torch.from_numpy(frame).to(device), Image.fromarray(frame)
    calls, sharpen_with_teacher = convolution_calls(fused, picture), Sharpener(teacher, device)
    video = VideoSharpener(Sharpener(student, device))
    name = f"student, fused ({str(fused.dtype).removeprefix('torch.')})"
    methods = {
        name: lambda: fused(picture),
        "student, video": lambda: video(frame),
        "student, fused, smooth chroma": lambda: smoothing(picture),
        "student, float32": lambda: in_float32(student, picture),
        "student, fused in float32": lambda: plain(picture),
        "convolutions alone": torch.inference_mode()(lambda: [F.conv2d(x, *layer, **more) for x, layer, more in calls]),
        "Pillow UnsharpMask(2, 150, 3)": lambda: pillow.filter(ImageFilter.UnsharpMask(2, 150, 3)),
        "scipy Gaussian unsharp mask": lambda: scipy_unsharp(frame),
        "teacher": lambda: sharpen_with_teacher(frame),
    }
    if device.type == "cuda":
        methods["student, fused, 8 frames"] = lambda: [fused(picture) for _ in range(8)]
    seconds = {method: [] for method in methods}
    for _ in range(ROUNDS):  # frames of one method follow each other, as in a video
        for method, run in methods.items():
            count = slow_rounds if method in SLOW else rounds
            for done in range(-2, count):  # two to warm up
                start = time.perf_counter()
                run()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                if done >= 0:
                    seconds[method].append(time.perf_counter() - start)
    networks = {"student": student, "teacher": teacher}
    print(f"\none frame of {width}x{height}          median ms  95th percentile   parameters  GMAC a frame")
    middle = {}
    for method, spent in seconds.items():
        average = np.mean if method == "student, video" else np.median  # one frame in eight takes longer
        middle[method], slow = average(spent) * 1000, np.percentile(spent, 95) * 1000
        network = networks.get(method.split(",")[0])
        gmac = network and gmac_per_megapixel(network) * height * width / 1e6
        columns = f"{count_parameters(network):12,d} {gmac:13.1f}" if network else ""
        print(f"{method:32s} {middle[method]:8.1f} {slow:16.1f} {columns}")
    others = [method for method in methods if method != name]
    print("fused student / " + ", / ".join(f"{method} {middle[name] / middle[method]:.2f}" for method in others))


def example_frame(height: int, width: int) -> np.ndarray:
    with Image.open(Path(skimage.__file__).parent / "data" / "coffee.png") as picture:
        return np.array(picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC))


@torch.inference_mode()
def in_float32(student: nn.Module, picture: Tensor) -> Tensor:
    photo = picture.movedim(-1, 0)[None].float().div(255)
    return student(photo).clamp(0, 1).mul(255).round().byte()[0].movedim(0, -1).contiguous()


def scipy_unsharp(frame: np.ndarray) -> np.ndarray:
    values = frame.astype(np.float32)
    values += 1.5 * (values - gaussian_filter(values, (2, 2, 0)))
    return values.round().clip(0, 255).astype(np.uint8)


@torch.inference_mode()
def convolution_calls(fused: FusedStudent, picture: Tensor) -> list[tuple]:
    """Input, weights and options of each convolution that ``fused`` runs for ``picture``."""
    calls, conv2d = [], F.conv2d

    def record(x: Tensor, *layer, **options) -> Tensor:
        calls.append((x.clone(), layer, options))
        return conv2d(x, *layer, **options)

    with mock.patch.object(F, "conv2d", record):
        fused(picture)
    return calls


if __name__ == "__main__":
    run_cli(main)
