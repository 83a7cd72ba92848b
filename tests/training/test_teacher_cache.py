import os
import shutil

import numpy as np
import pytest
import torch
from conftest import hold_locks, wait_for

import utils
from dataset import PairedImageDataset, sample_index
from models import StudentCNN, TeacherCNN
from training.teacher_cache import cache_blur_embeddings, cache_teacher_outputs
from utils import UserError, quantize_8bit, to_pixels, to_tensor

CPU = torch.device("cpu")


def teacher_of(seed):
    torch.manual_seed(seed)
    teacher = TeacherCNN(width=4, deep_width=8, hidden=[8], fine_blocks=1)
    torch.nn.init.normal_(teacher.tail.weight, std=0.05)
    return teacher.eval()


def test_a_cached_output_is_the_patch_of_the_output_for_the_whole_photo(pairs, precision):
    train_set, teacher = PairedImageDataset(pairs / "train", patch_size=32), teacher_of(1)
    without = [train_set[k] for k in range(5)]
    train_set.targets = cache_teacher_outputs(teacher, train_set, 1.0, CPU)
    whole = PairedImageDataset(pairs / "train")
    with torch.no_grad(), utils.autocast(CPU):
        outputs = [quantize_8bit(teacher(blurry[None]))[0] for blurry, _ in whole]
    for k in range(5):
        blurry, output, *_ = train_set[k]
        assert torch.equal(blurry, without[k][0]) and not torch.equal(output, without[k][1])
        photo = outputs[sample_index(k, 3, 0)[0]]
        turns = [photo.rot90(t, (1, 2)) for t in range(4)] + [photo.flip(-1).rot90(t, (1, 2)) for t in range(4)]
        windows = [t.unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4) for t in turns]
        nearest = min(float((w - output).abs().amax((2, 3, 4)).min()) for w in windows)
        assert nearest < 1.5 / 255, "rounding to 8 bits may go either way"


def test_a_target_can_be_a_mixture_of_the_output_and_the_sharp_photo(pairs, precision):
    targets = {}
    for weight in 0, 0.25, 1:
        train_set = PairedImageDataset(pairs / "train", patch_size=32)
        train_set.targets = cache_teacher_outputs(teacher_of(1), train_set, weight, CPU)
        targets[weight] = train_set[range(6)][1]
    assert torch.equal(targets[0], PairedImageDataset(pairs / "train", patch_size=32)[range(6)][1])
    assert (targets[1] - targets[0]).abs().max() > 0.1
    assert (targets[0].lerp(targets[1], 0.25) - targets[0.25]).abs().max() <= 0.76 / 255, "two roundings"


def test_a_teacher_runs_once_and_again_when_it_or_the_photos_change_or_its_outputs_are_truncated(pairs, monkeypatch):
    asked = []

    def counting(teacher, blurry):
        asked.append(1)
        return teacher(blurry)

    monkeypatch.setattr("training.teacher_cache.run_tiled", counting)
    for teacher, expected in (teacher_of(1), 3), (teacher_of(1), 3), (teacher_of(2), 6):
        cache_teacher_outputs(teacher, PairedImageDataset(pairs / "train", 32), 1.0, CPU)
        assert len(asked) == expected
    shutil.copy(pairs / "train/001/sharp.png", pairs / "train/001/blurry.png")
    cache_teacher_outputs(teacher_of(2), PairedImageDataset(pairs / "train", 32), 1.0, CPU)
    assert len(asked) == 9
    (outputs,) = (pairs / "train" / ".cache").glob("*.outputs")
    os.truncate(outputs, 1300)
    cache_teacher_outputs(teacher_of(2), PairedImageDataset(pairs / "train", 32), 1.0, CPU)[2]
    assert len(asked) == 12


def test_an_interrupted_teacher_runs_on_the_rest_only(pairs, monkeypatch, precision):
    teacher, seen = teacher_of(1), []

    def counting(teacher, blurry):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(blurry.shape)
        return teacher(blurry)

    train_set, cache = PairedImageDataset(pairs / "train", 32), pairs / "train" / ".cache"
    (cache / ".0-of-another-teacher.outputs.partial").touch()
    with monkeypatch.context() as patch:
        patch.setattr("training.teacher_cache.run_tiled", counting)
        with pytest.raises(KeyboardInterrupt):
            cache_teacher_outputs(teacher, train_set, 1.0, CPU)
    (partial,) = cache.glob(".*.outputs.partial")
    with open(partial, "ab") as file:
        file.write(b"half of an output")
    monkeypatch.setattr("training.teacher_cache.run_tiled", lambda teacher, blurry: seen.append(1) or teacher(blurry))
    targets = cache_teacher_outputs(teacher, train_set, 1.0, CPU)
    assert len(seen) == 3 and not list(cache.glob(".*.partial"))
    for index in range(3):
        with torch.no_grad(), utils.autocast(CPU):
            expected = to_pixels(teacher(to_tensor(train_set.blurry[index])[None])[0].float())
        assert np.array_equal(targets[index], expected)


def test_outputs_can_be_the_mean_over_the_eight_orientations(pairs, precision):
    train_set, teacher = PairedImageDataset(pairs / "train", 32), teacher_of(1)
    targets = cache_teacher_outputs(teacher, train_set, 1.0, CPU, orientations=8)
    photo = to_tensor(train_set.blurry[0])[None]
    orientations = [(photo.rot90(k, (2, 3)), k, False) for k in range(4)] + [
        (photo.flip(3).rot90(k, (2, 3)), k, True) for k in range(4)
    ]
    with torch.no_grad(), utils.autocast(CPU):
        outputs = [(teacher(p).float().rot90(-k, (2, 3)), flipped) for p, k, flipped in orientations]
    mean = sum(output.flip(3) if flipped else output for output, flipped in outputs) / 8
    assert np.abs(targets[0].astype(int) - to_pixels(mean[0]).astype(int)).max() <= 1
    assert np.abs(targets[0].astype(int) - to_pixels(outputs[0][0][0])).max() > 1, "one orientation differs"


def test_two_trainings_do_not_compute_the_same_outputs_at_once(pairs, start, tmp_path):
    train_set = PairedImageDataset(pairs / "train", 32)
    other = start(hold_locks, train_set.cache, log=tmp_path / "log")
    wait_for("held", other, tmp_path / "log")
    with pytest.raises(UserError, match="another training is writing to .*cache: wait for it"):
        cache_teacher_outputs(teacher_of(1), train_set, 1.0, CPU)


def test_a_student_given_cached_embeddings_computes_as_one_given_spectra(pairs):
    train_set, student = PairedImageDataset(pairs / "train", patch_size=32), StudentCNN().eval()
    torch.nn.init.normal_(student.kernel_head.weight, std=0.05 * student.kernel_head.in_features)  # OutputLinear
    torch.nn.init.normal_(student.estimator.tail.weight, std=0.05)
    spectra = train_set[range(9)]
    train_set.embeddings = cache_blur_embeddings(student, train_set, CPU)
    embedded = train_set[range(9)]
    assert torch.equal(spectra[0], embedded[0]) and torch.equal(spectra[1], embedded[1])
    assert spectra[2].shape == (9, 9, 64, 33) and embedded[2].shape == (9, 2 * (64 + 92 + 145 + 16) + 3)
    with torch.no_grad():
        one, other = student(spectra[0], spectra[2]), student(embedded[0], embedded[2])
    assert (one - spectra[0]).abs().max() > 0.05, "the student changes the photo"
    torch.testing.assert_close(one, other)


def test_embeddings_are_computed_once_for_each_estimator_whatever_the_rest_of_the_student(pairs, monkeypatch):
    calls, embed_blur = [], StudentCNN.embed_blur
    monkeypatch.setattr(StudentCNN, "embed_blur", lambda *a: calls.append(1) or embed_blur(*a))
    for bias, expected in (0, 3), (0, 3), (1, 6):  # three photos
        student = StudentCNN()
        for parameter in student.estimator.parameters():
            torch.nn.init.constant_(parameter, 0.01)
        torch.nn.init.constant_(student.estimator.tail.bias, bias)
        cache_blur_embeddings(student, PairedImageDataset(pairs / "train", 32), CPU)
        assert len(calls) == expected
    assert len(list((pairs / "train" / ".cache").glob("*.embeddings"))) == 1
