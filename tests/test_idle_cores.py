import os
from collections import deque

import pytest
import torch

import idle_cores


@pytest.fixture
def busy(monkeypatch):
    """Sets what other programs do at the next looks at a machine of 4 cores, and returns torch's number of threads then."""

    def look(*busy_cores: int, cores: int = 4) -> int:
        monkeypatch.setattr(os, "cpu_count", lambda: cores)
        looks, looked = iter(busy_cores), []
        monkeypatch.setattr(idle_cores, "count_busy_cores", lambda: looked.append(next(looks)) or looked[-1])
        while len(looked) < len(busy_cores):
            idle_cores.use_idle_cores()
        return torch.get_num_threads()

    threads = [4]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(idle_cores, "busy_cores", deque(maxlen=5))
    monkeypatch.setattr(idle_cores, "ALL_THREADS", 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    return look


@pytest.mark.parametrize("looks, cores, threads", [("02220", 4, 2), ("00100", 4, 4), ("44444", 4, 1), ("11111", 64, 4)])
def test_cores_that_others_use_are_left_to_them(busy, looks, cores, threads):
    assert busy(*map(int, looks), cores=cores) == threads


def test_a_load_that_comes_later_is_seen_and_one_that_ends_too(busy):
    assert busy(0, 0, 0, 0, 0) == 4
    assert busy(2, 2) == 4  # no more than a burst
    assert busy(2) == 2
    assert busy(0, 0, 0) == 4


def test_with_omp_num_threads_nobody_looks(busy, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(idle_cores, "count_busy_cores", lambda: pytest.fail("looked"))
    idle_cores.use_idle_cores()
    assert torch.get_num_threads() == 4


def test_a_program_does_not_count_its_own_threads(tmp_path):
    (tmp_path / "loadavg").write_text("0.1 0.2 0.3 5/99 1234\n")
    for task, state in enumerate("RSR"):
        (tmp_path / f"self/task/{task}").mkdir(parents=True)
        (tmp_path / f"self/task/{task}/stat").write_text(f"{task} (a name) R 1) {state} 1 2 3")
    assert idle_cores.count_busy_cores(tmp_path) == 3
