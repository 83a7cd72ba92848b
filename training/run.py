"""One training from its first step to its last: optimizer, checkpoints, history, best weights."""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Dataset
from tqdm import tqdm

from idle_cores import use_idle_cores
from images.files import read_torch_file, write_torch_file
from models import save_model
from training.config import TrainConfig
from training.distributed import all_ranks_together, gather, rank, world_size
from training.fingerprint import identity_of
from training.loop import load_batches
from training.report import draw_curves, write_table
from utils import Scores, UserError, print0

EMA_SHARE = 0.05  # of all steps: time constant of the moving average of the weights, which is what is kept
CHECK_EVERY = 50  # steps between checks of loss and clock: reading a number waits for the GPU
CHECKPOINT_SECONDS = 300  # between checkpoints within an epoch; one is always written after each epoch


@dataclass(eq=False)
class TrainingRun(contextlib.AbstractContextManager):
    """Trains ``network`` over ``config.num_epochs`` epochs and keeps the weights with the best validation SSIM.

    The loop is in train.py. The learning rate rises to that of ``optimizer`` over the first 5% of the steps, then a cosine
    takes it to 0. ``averaged``, an exponential moving average of the weights, is validated and kept: scores of single steps
    jump (SWA, arXiv:1803.05407, takes a plain mean). A checkpoint in ``outputs`` is written after each epoch and every few
    minutes; with ``config.resume`` a training resumes from it, on the CPU bit for bit. It is deleted when the ``with`` block
    ends without an error.

    Raises ``UserError`` if an interrupted training cannot be resumed, if the loss is no longer finite (the best weights are
    kept), or if a file cannot be written.
    """

    name: str  # "student" or "teacher", for what is printed and for the names of files in ``outputs``
    network: nn.Module
    optimizer: torch.optim.Optimizer
    loss_fn: nn.Module | Callable
    train_set: Dataset
    val_key: str  # ``key`` of the validation set
    config: TrainConfig
    device: torch.device
    baselines: dict[str, Scores]  # of others on the validation set, shown beside this network's
    best_file: Path | str
    outputs: Path | str
    extra: dict | None = None  # more that must be the same when the training is resumed; name -> plain value

    def __post_init__(self):
        self.best_file, self.outputs = Path(self.best_file), Path(self.outputs)
        config, optimizer = self.config, self.optimizer
        self.steps = max(1, len(self.train_set) * config.patches_per_photo // config.batch_size)  # per epoch
        total = config.num_epochs * self.steps
        average = get_ema_multi_avg_fn(max(0.0, 1 - 1 / (EMA_SHARE * total)))
        self._average = AveragedModel(self.network, multi_avg_fn=average)
        self.averaged = self._average.module
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, total))
        self._parts = self.network, self._average, optimizer, self.schedule  # in a checkpoint
        settings = {name: value for name, value in optimizer.defaults.items() if name != "lr"}  # that is LEARNING_RATE
        self.identity = config.identity() | identity_of(self.network, self.loss_fn) | (self.extra or {})
        self.identity["photos"] = f"{self.train_set.key} {self.val_key}"
        self.identity["the optimizer"] = f"{type(optimizer).__name__} {settings}"
        self.checkpoint = self.outputs / f"{self.name}_checkpoint.pth"
        self.done = 0  # steps, over all epochs
        # A row of the table for each epoch: "epoch", "loss", "seconds", and "NAME_psnr" (dB) and "NAME_ssim" of each network
        self.history: list[dict[str, float]] = []
        self.loss_sum = torch.zeros((), device=self.device)  # over this epoch
        if config.resume and self.checkpoint.is_file():
            with all_ranks_together():
                self._resume()
            print0(f"resuming the interrupted training after step {self.done} of {total}")
        steps = range(self.done, total)
        self.loader = load_batches(self.train_set, self.device, steps, config.batch_size, config.num_workers)
        # What the loop calls: under torchrun, gradients are averaged over the processes
        self.model = nn.parallel.DistributedDataParallel(self.network) if world_size() > 1 else self.network
        self.writer = None
        if config.tensorboard and rank() == 0:
            from torch.utils.tensorboard import SummaryWriter  # an extra, which TrainConfig has looked for

            self.writer = SummaryWriter(self.outputs / "tensorboard", purge_step=len(self.history) + 1)
        self._save(self.loss_sum.item())  # now, so that a folder that cannot be written to is reported before the work

    def __exit__(self, kind, error, traceback) -> None:
        if self.writer:
            self.writer.close()
        if kind is None and rank() == 0:
            self.checkpoint.unlink(missing_ok=True)
        if kind is KeyboardInterrupt:
            epochs = f"{len(self.history)} of {self.config.num_epochs} epochs"
            raise KeyboardInterrupt(f"\nStopped after {epochs}: {self._kept()}. Run again to resume.") from None

    def epochs(self) -> range:
        """Numbers of the epochs that are left, from 1."""
        return range(len(self.history) + 1, self.config.num_epochs + 1)

    @property
    def best(self) -> Scores:
        """Scores of the weights in ``best_file``."""
        scores = (Scores(row[f"{self.name}_psnr"], row[f"{self.name}_ssim"]) for row in self.history)
        return max(scores, key=lambda each: each.ssim, default=Scores(-math.inf, -math.inf))

    def _kept(self) -> str:
        best = f"the best weights so far, SSIM {self.best.ssim:.4f}, are in {self.best_file}"
        return best if self.history else "there are no weights yet"

    def batches(self) -> Iterator[list[Tensor]]:
        """The batches left in this epoch, on the device; shows a progress bar and saves checkpoints between them."""
        self.model.train()
        self.started = time.perf_counter()
        first = self.done % self.steps
        left = islice(self.loader, self.steps - first)
        hidden = rank() != 0 or None  # None: shown on a terminal, not in a log file
        for batch in tqdm(left, self._title(), self.steps, initial=first, unit="step", leave=False, disable=hidden):
            yield [part.to(self.device, non_blocking=True) for part in batch]
            self.done += 1
            if self.done % CHECK_EVERY == 0 and self.done % self.steps != 0:
                use_idle_cores()
                loss_sum = self._mean_loss_sum()
                if time.monotonic() - self.last_save > CHECKPOINT_SECONDS:
                    self._save(loss_sum)

    def step(self, loss: Tensor) -> None:
        """Backward pass, gradient clipping, and a step of optimizer, learning rate and averaged weights."""
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self._average.update_parameters(self.network)
        self.loss_sum += loss.detach().squeeze()

    def finish_epoch(self, scores: Scores) -> None:
        """Print and store the scores of ``averaged`` on the validation set, and its last and best weights."""
        loss, seconds, title = self._mean_loss_sum(scores) / self.steps, time.perf_counter() - self.started, self._title()
        others = ", ".join(f"{name} {value.psnr:.2f} {value.ssim:.4f}" for name, value in self.baselines.items())
        better = scores.ssim > self.best.ssim
        row = {"epoch": len(self.history) + 1, "loss": loss, "seconds": seconds}
        for name, value in (self.baselines | {self.name: scores}).items():
            row |= {f"{name}_psnr": value.psnr, f"{name}_ssim": value.ssim}
        self.history.append(row)
        self.loss_sum.zero_()
        if rank() == 0:
            metadata = dict(epoch=len(self.history), val=scores._asdict(), training=self.identity)
            save_model(self.outputs / f"{self.name}_last.pth", self.averaged, **metadata)
            if better:
                save_model(self.best_file, self.averaged, **metadata)
            write_table(self.outputs / f"{self.name}_epochs.csv", self.history)
            draw_curves(self.outputs / f"{self.name}_curves.png", self.history)
            if self.writer:
                for name, value in row.items():
                    self.writer.add_scalar(name, value, len(self.history))
                self.writer.flush()
            self._save()
            print(f"{title}  loss {loss:.6f}  {scores}  ({others})  {seconds:.1f} s{'  best' if better else ''}", flush=True)

    def _title(self) -> str:
        return f"{self.name} {len(self.history) + 1}/{self.config.num_epochs}"

    def _mean_loss_sum(self, scores: Sequence[float] = ()) -> float:
        """Mean over the ranks. Raises ``UserError`` if it or one of the ``scores`` is not finite."""
        loss_sum = sum(gather(self.loss_sum.item())) / world_size()
        if not math.isfinite(loss_sum + sum(scores)):
            if rank() == 0:
                self.checkpoint.unlink(missing_ok=True)  # resuming from it would only lead here again
            loss = f"the loss of {self._title()} is no longer a finite number"
            gather(UserError(f"{loss}: lower LEARNING_RATE; {self._kept()}"))  # raises it
        return loss_sum

    def _save(self, loss_sum: float = 0.0) -> None:
        """Write everything that the rest of the training depends on: the old file or the new, never half."""
        self.last_save = time.monotonic()
        if rank() != 0:
            return
        generators = {"cpu": torch.get_rng_state()}  # networks with dropout draw from these
        if torch.cuda.is_initialized():
            generators["cuda"] = torch.cuda.get_rng_state()
        states = [part.state_dict() for part in self._parts]
        progress = dict(done=self.done, history=self.history, loss_sum=loss_sum, threads=torch.get_num_threads())
        write_torch_file(self.checkpoint, dict(identity=self.identity, states=states, generators=generators, **progress))

    def _resume(self) -> None:
        try:
            content = read_torch_file(self.checkpoint)
            old, new = content["identity"], self.identity
            if different := [name for name in new | old if old.get(name) != new.get(name)]:
                changed = "; ".join(f"{name} was {old.get(name)}, is {new.get(name)}" for name in different)
                raise UserError(
                    f"{self.checkpoint} belongs to an interrupted training with other settings ({changed}): "
                    "set RESUME = False to discard it and start over, or restore the old values to resume it"
                )
            for part, state in zip(self._parts, content["states"], strict=True):
                part.load_state_dict(state)
            self.done, self.history = content["done"], content["history"]
            self.loss_sum.fill_(content["loss_sum"])
            if "OMP_NUM_THREADS" not in os.environ:  # gradients are summed in another order on more or fewer threads
                torch.set_num_threads(content["threads"])
            torch.set_rng_state(content["generators"]["cpu"])
            if "cuda" in content["generators"] and torch.cuda.is_initialized():
                torch.cuda.set_rng_state(content["generators"]["cuda"])
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):  # it holds something else
            raise UserError(f"{self.checkpoint} is damaged: remove it or set RESUME = False to start over") from None
        if self.history and not self.best_file.is_file():
            raise UserError(
                f"{self.best_file}, the best weights of the interrupted training, is missing: "
                "put it back or set RESUME = False to start over"
            )


def warmup_cosine(step: int, steps: int) -> float:
    """Factor of the learning rate: linearly up over the first 5% of ``steps``, then half a cosine down to 0."""
    warmup = max(1, steps // 20)
    cosine = 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))
    return (step + 1) / warmup if step < warmup else cosine


def lock_path(path: Path | str) -> IO | contextlib.nullcontext:
    """Keep other trainings from writing to ``path``, a folder or a .pth file, as long as the returned file is open.

    Raises ``UserError`` if another one does. Windows has no such locks; where a drive has none, a line is printed.
    """
    if rank() != 0:
        return contextlib.nullcontext()
    path = Path(path)
    lock = path.with_name(f".{path.name}.lock") if path.suffix == ".pth" else path / ".lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    file = open(lock, "w")  # noqa: SIM115
    with contextlib.suppress(ImportError):
        import fcntl

        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.close()
            raise UserError(f"another training is writing to {path}: wait for it, or choose another place") from None
        except OSError as error:
            print(f"{lock} cannot be locked ({error.strerror}): start nothing else that writes there")
    return file
