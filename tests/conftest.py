"""Dummy photos and pairs, made in a temporary folder, and processes beside the tests."""

import functools
import gc
import inspect
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))  # the scripts are not installed

import fused_student
import prepare_data
import pretrain
import sharpen
import train
import training.teacher_cache
import utils
from blur.filters import convolve, gaussian_kernel
from dataset import PairedImageDataset
from idle_cores import use_idle_cores
from inference import run_patches
from models import StudentCNN, TeacherCNN, load_model, save_model
from training.config import TrainConfig
from training.loop import validate
from training.run import TrainingRun, lock_path
from utils import to_pixels, to_tensor

# Parses the whole file of a class, which takes longer than two epochs of a small training
inspect.getsource = functools.cache(inspect.getsource)

# For tests of what runs on a GPU too
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA"))]


@functools.cache
def shipped(name: str) -> nn.Module:
    """The shipped student or teacher, loaded once for all tests, which leave it as it is."""
    return load_model(Path(__file__).parent.parent / "weights" / f"{name}.pth")


@functools.cache
def gmac_of(kind: type, *arguments) -> float:
    """``gmac_per_megapixel`` of an untrained network, which takes half a second and does not depend on its weights."""
    return utils.gmac_per_megapixel(kind(*arguments))


@pytest.fixture(scope="session")
def perceptual_loss() -> utils.PerceptualLoss:
    """With random weights; those of the linear layers of VGG16, which it leaves out, are not drawn: that takes a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Linear, "reset_parameters", lambda layer: None)
        patch.setattr(nn.init, "normal_", lambda *_: None)
        return utils.PerceptualLoss(weights=None)


def dummy_photo(height: int, width: int, seed: int) -> np.ndarray:
    """(height, width, 3) uint8: random rectangles, so that there are edges to sharpen."""
    rng = np.random.default_rng(seed)
    photo = np.full((height, width, 3), 128, np.uint8)
    for _ in range(25):
        top, left = rng.integers(height), rng.integers(width)
        photo[top : top + rng.integers(2, 24), left : left + rng.integers(2, 24)] = rng.integers(0, 256, 3)
    return photo


def texture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """(1, 3, H, W): gray noise with the spectrum of a photo, all over it; values around 0.5."""
    frequency = torch.fft.fftfreq(height)[:, None].hypot(torch.fft.rfftfreq(width)).clamp(min=1e-3)
    noise = torch.randn(1, 1, height, width, generator=torch.Generator().manual_seed(seed))
    noise = torch.fft.irfft2(torch.fft.rfft2(noise) / frequency)
    return (0.5 + 0.1 * noise / noise.std()).expand(1, 3, -1, -1).clone()


def write_pair(folder: Path, height: int = 40, width: int = 48, seed: int = 0) -> None:
    folder.mkdir(parents=True)
    sharp = dummy_photo(height, width, seed)
    Image.fromarray(sharp).save(folder / "sharp.png")
    Image.fromarray(to_pixels(convolve(to_tensor(sharp), gaussian_kernel(1.2)))).save(folder / "blurry.png")


def small_config(**changes) -> TrainConfig:
    """A training of two epochs of three steps on the pairs below."""
    small = dict(num_epochs=2, patches_per_photo=3, batch_size=3, patch_size=32, learning_rate=1e-2, seed=0)
    return TrainConfig(**(small | changes))


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def precision(request, monkeypatch) -> torch.dtype:
    """Autocast in this type whatever the processor prefers: the claims hold on all."""
    for module in utils, fused_student, training.teacher_cache:
        monkeypatch.setattr(module, "autocast_dtype", lambda device: request.param)
    return request.param


def small_teacher(strength=0.02):
    """A teacher that changes the luma of its input a little, so that there is something a student can learn."""
    teacher = TeacherCNN(width=4, deep_width=8, hidden=[8], fine_blocks=1)
    nn.init.normal_(teacher.tail.weight, std=strength)
    teacher.tail.weight.data = teacher.tail.weight.data[:4].repeat(3, 1, 1, 1)  # of four pixels, alike for each color
    return teacher.eval().requires_grad_(False)


class FailsInEpoch2(nn.MSELoss):
    """Stands for anything that goes wrong in the second epoch: calls ``fail`` on the loss of the sixth call."""

    steps = 0

    def __init__(self, fail):
        super().__init__()
        type(self).fail = staticmethod(fail)  # not of the object, where another function would count as another loss

    def forward(self, prediction, target, *_):  # pretrain.py's loss takes one argument more
        self.steps += 1
        loss = super().forward(prediction, target)
        return self.fail(loss) if self.steps == 6 else loss


def interrupt(loss):
    raise KeyboardInterrupt


@pytest.fixture
def pairs(tmp_path) -> Path:
    """data/ with three training pairs and two validation pairs, of differing sizes."""
    for part, count in ("train", 3), ("val", 2):
        for k in range(count):
            write_pair(tmp_path / "data" / part / f"{k + 1:03d}", 40 + 3 * k, 48 - 5 * k, seed=10 * len(part) + k)
    return tmp_path / "data"


def pytest_configure(config: pytest.Config) -> None:
    use_idle_cores()  # beside another program two threads are several times slower than one
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # and not another number in each test


def pytest_collection_finish(session: pytest.Session) -> None:
    """Set going what ``start`` forks its processes from, which imports torch while other tests are at work."""
    gc.freeze()  # what was imported stays: the garbage collector need not go through it again and again
    if any("start" in item.fixturenames for item in session.items):
        from multiprocessing import forkserver  # which Windows has not

        # The second is what torch imports for every optimizer, in two seconds; train is found from the repository's root
        forkserver.set_forkserver_preload(["train", "torch._dynamo"])
        forkserver.ensure_running()


@pytest.fixture
def start():
    """Calls ``work`` of a module in a process of its own, forked from one that has imported torch once for all of them.

    What it prints goes to ``log``. If it is still at work when the test ends, it is killed. Linux and macOS only.
    """
    forks, processes = multiprocessing.get_context("forkserver"), []

    def start(work: Callable, *arguments, log: Path) -> multiprocessing.Process:
        log.touch()
        process = forks.Process(target=_as_if_alone, args=(multiprocessing.get_start_method(), log, work, *arguments))
        process.start()
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()


def _as_if_alone(start_method: str, log: Path, work: Callable, *arguments) -> None:
    multiprocessing.set_start_method(start_method, force=True)  # of its own workers
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    work(*arguments)


def fit(network, train_set, val_set, config, best, outputs, target_of=None, loss_fn=None, validate=validate) -> None:
    """The loop of train.py, on the CPU."""
    loss_fn, device = loss_fn or nn.MSELoss(), torch.device("cpu")
    optimizer = torch.optim.AdamW(network.parameters(), config.learning_rate, weight_decay=1e-4, fused=True)
    files = dict(baselines={}, best_file=best, outputs=outputs)
    run = TrainingRun("student", network, optimizer, loss_fn, train_set, val_set.key, config, device, **files)
    with run:
        for _ in run.epochs():
            for blurry, target, blur, input_mse in run.batches():
                with torch.no_grad():
                    target = target_of(blurry, target, blur) if target_of else target
                with utils.autocast(device):
                    prediction = run_patches(run.model, blurry, blur)
                prediction = prediction.float()
                prediction.register_hook(utils.relative_weight(input_mse).mul)
                run.step(loss_fn(prediction, target))
            run.finish_epoch(validate(run.averaged, val_set, device))


@pytest.fixture
def run(pairs, tmp_path):
    """``fit`` on dummy pairs, by default two epochs of three steps."""
    train_set, val_set = PairedImageDataset(pairs / "train", 32), PairedImageDataset(pairs / "val")

    def run(network, target_of=None, loss_fn=None, best="best.pth", epochs=2, steps=3, outputs="outputs", **more):
        checks = {name: more.pop(name) for name in list(more) if name == "validate"}
        config = small_config(num_epochs=epochs, patches_per_photo=steps, **more)
        fit(network, train_set, val_set, config, tmp_path / best, tmp_path / outputs, target_of, loss_fn, **checks)

    run.train_set, run.val_set = train_set, val_set
    return run


@pytest.fixture
def constants(pairs, tmp_path, monkeypatch):
    """train.py's constants for a run of seconds in a temporary folder."""
    monkeypatch.chdir(tmp_path)
    small = dict(NUM_EPOCHS=2, PATCHES_PER_PHOTO=3, BATCH_SIZE=2, PATCH_SIZE=32, DEVICE="cpu", NUM_WORKERS=0)
    for module in train, pretrain:
        for name, value in small.items():
            monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(pretrain, "ESTIMATOR_VERSIONS", 2)
    monkeypatch.setattr(pretrain, "ESTIMATOR_PASSES", 1)
    monkeypatch.setattr(train, "TEACHER_WEIGHTS", "teacher.pth")
    monkeypatch.setattr(train, "TEACHER_ORIENTATIONS", 2)
    monkeypatch.setattr(train, "REQUIRE_GOOD_TEACHER", False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # scripts of their own processes are small
    monkeypatch.setattr(
        "training.report.ms_per_megapixel", lambda network, device: 1.0
    )  # which takes longer than all the rest
    save_model(tmp_path / "teacher.pth", small_teacher())
    return tmp_path


@pytest.fixture
def prepare(tmp_path, monkeypatch, capsys):
    """Runs ``python prepare_data.py ARGUMENTS``; returns what it printed, or its error. The exit code goes to ``.code``."""

    def run(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", ["prepare_data.py", *(str(a) for a in arguments)])
        run.code = 0
        try:
            prepare_data.main()
        except prepare_data.UserError as error:
            run.code = 1
            return f"error: {error}"
        except SystemExit as end:
            run.code = end.code
        return capsys.readouterr().out

    return run


def changing_network(kind=StudentCNN, strength=0.01, **arguments):
    """An untrained student or teacher that changes photos at random."""
    torch.manual_seed(3)
    made = kind(**arguments)
    last = made.convs[-1].base if kind is StudentCNN else made.tail
    torch.nn.init.normal_(last.weight, std=strength)
    return made.eval()


@pytest.fixture
def run_sharpen(tmp_path, monkeypatch, capsys):
    """Runs ``python sharpen.py ARGUMENTS`` in ``tmp_path``; returns its exit code, what it printed, and its errors."""
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "best_student_model.pth", changing_network())

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["sharpen.py", *(str(a) for a in arguments)])
        code = 0
        try:
            sharpen.run_cli(sharpen.main)
        except SystemExit as end:
            code = end.code
        printed, errors = capsys.readouterr()
        return (1, printed, code) if isinstance(code, str) else (code, printed, errors)

    return run


def hold_locks(folder: Path) -> None:
    locks = lock_path(folder), lock_path(folder / "best.pth")  # noqa: F841  held until it is killed
    print("held", flush=True)
    time.sleep(60)


def wait_for(text: str, process: multiprocessing.Process, log: Path) -> None:
    deadline = time.monotonic() + 60
    while text not in log.read_text():
        assert process.is_alive() and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
