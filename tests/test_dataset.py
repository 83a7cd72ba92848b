import contextlib
import shutil

import numpy as np
import pytest
import torch
from conftest import dummy_photo, write_pair
from PIL import Image
from torch.utils.data import DataLoader

import dataset
from blurred import SyntheticBlurDataset
from dataset import (
    PairedImageDataset,
    batches_of_one_size,
    find_or_make_data,
    make_demo_data,
)
from degradations import Mixture
from models import StudentCNN, TeacherCNN
from patches import sample_index, to_pixels, to_tensor
from photos import find_photos
from utils import UserError, quantize_8bit


def test_whole_photos_come_in_order_with_their_own_sizes(pairs):
    val_set = PairedImageDataset(pairs / "val")
    assert len(val_set) == 2 and [tuple(b.shape) for b, _ in val_set] == [(3, 40, 48), (3, 43, 43)]
    for (blurry, sharp), folder in zip(val_set, sorted((pairs / "val").glob("[0-9]*")), strict=True):
        for image, name in (blurry, "blurry.png"), (sharp, "sharp.png"):
            assert image.dtype == torch.float32
            assert torch.equal(image, to_tensor(np.array(Image.open(folder / name))))
    with pytest.raises(IndexError):
        val_set[2]


def test_patches_are_the_same_place_and_turn_of_both_photos(tmp_path):
    write_pair(tmp_path / "001", 40, 50)
    shutil.copy(tmp_path / "001" / "sharp.png", tmp_path / "001" / "blurry.png")
    train_set = PairedImageDataset(tmp_path, patch_size=16)
    photo = to_tensor(np.array(Image.open(tmp_path / "001" / "sharp.png")))
    windows = photo.unfold(1, 16, 1).unfold(2, 16, 1).permute(1, 2, 0, 3, 4).reshape(-1, 3, 16, 16)
    upright = 0
    for k in range(40):
        blurry, sharp, _ = train_set[k]
        assert torch.equal(blurry, sharp)
        turns = [sharp.rot90(-t, (1, 2)) for t in range(4)]
        turns += [t.flip(-1) for t in turns]
        found = [bool((windows == t).flatten(1).all(1).any()) for t in turns]
        assert any(found), "a patch must be cut from the photo"
        upright += found[0]
    assert upright < 20, "patches must be turned and flipped"


def test_the_same_seed_gives_the_same_patches_in_any_order_and_another_gives_others(pairs):
    first, second = (PairedImageDataset(pairs / "train", 16, seed=3) for _ in range(2))
    forwards = [first[k][0] for k in range(12)]
    backwards = [second[k][0] for k in reversed(range(12))]
    assert all(torch.equal(a, b) for a, b in zip(forwards, reversed(backwards), strict=True))
    other = PairedImageDataset(pairs / "train", 16, seed=4)
    assert sum(torch.equal(other[k][0], forwards[k]) for k in range(12)) <= 1
    assert len({patch.numpy().tobytes() for patch in forwards}) >= 11


def test_worker_processes_give_the_same_patches(pairs):
    train_set = PairedImageDataset(pairs / "train", 16)
    batches = [list(DataLoader(train_set, 2, sampler=range(8), num_workers=workers)) for workers in (0, 2)]
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(*batches, strict=True))


def test_each_lap_takes_each_photo_once(tmp_path):
    for k in range(5):
        folder = tmp_path / f"{k}"
        folder.mkdir()
        for name in "blurry.png", "sharp.png":
            Image.fromarray(np.full((16, 16, 3), k, np.uint8)).save(folder / name)
    train_set = PairedImageDataset(tmp_path, patch_size=16)
    laps = [[round(float(train_set[5 * lap + k][0].mean()) * 255) for k in range(5)] for lap in range(4)]
    assert all(sorted(lap) == [0, 1, 2, 3, 4] for lap in laps)
    assert len({tuple(lap) for lap in laps}) > 1


def teacher_of(seed):
    torch.manual_seed(seed)
    teacher = TeacherCNN(width=4, deep_width=8, blocks=1, fine_blocks=1)
    torch.nn.init.normal_(teacher.tail.weight, std=0.05)
    return teacher.eval()


def test_a_known_answer_is_the_patch_of_what_the_teacher_makes_of_the_whole_photo(pairs, monkeypatch):
    monkeypatch.setattr("dataset.autocast", lambda device: contextlib.nullcontext())  # the same in float32
    train_set, teacher = PairedImageDataset(pairs / "train", patch_size=32), teacher_of(1)
    without = [train_set[k] for k in range(12)]
    train_set.cache_teacher_outputs(teacher, torch.device("cpu"))
    whole = PairedImageDataset(pairs / "train")
    with torch.no_grad():
        answers = [quantize_8bit(teacher(blurry[None]))[0] for blurry, _ in whole]
    for k in range(12):
        blurry, answer, _ = train_set[k]
        assert torch.equal(blurry, without[k][0]) and not torch.equal(answer, without[k][1])
        photo = answers[sample_index(k, 3, 0)[0]]
        turns = [photo.rot90(t, (1, 2)) for t in range(4)] + [photo.flip(-1).rot90(t, (1, 2)) for t in range(4)]
        windows = [t.unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4) for t in turns]
        nearest = min(float((w - answer).abs().amax((2, 3, 4)).min()) for w in windows)
        assert nearest < 1.5 / 255, "rounding to whole grey levels may fall either way"


def test_a_target_can_be_a_mixture_of_the_answer_and_the_sharp_photo(pairs):
    targets = {}
    for weight in 0, 0.25, 1:
        train_set = PairedImageDataset(pairs / "train", patch_size=32)
        train_set.cache_teacher_outputs(teacher_of(1), torch.device("cpu"), weight)
        targets[weight] = train_set.batch(range(6))[1]
    assert torch.equal(targets[0], PairedImageDataset(pairs / "train", patch_size=32).batch(range(6))[1])
    assert (targets[1] - targets[0]).abs().max() > 0.1
    assert (targets[0].lerp(targets[1], 0.25) - targets[0.25]).abs().max() <= 0.76 / 255, "two roundings"


def test_a_teacher_is_asked_once_and_again_when_it_or_the_photos_change(pairs, monkeypatch):
    asked = []

    def counting(teacher, blurry):
        asked.append(1)
        return teacher(blurry)

    monkeypatch.setattr("dataset.run_tiled", counting)
    cpu = torch.device("cpu")
    for teacher, expected in (teacher_of(1), 3), (teacher_of(1), 3), (teacher_of(2), 6):
        PairedImageDataset(pairs / "train", 32).cache_teacher_outputs(teacher, cpu)
        assert len(asked) == expected
    Image.fromarray(dummy_photo(40, 48, seed=77)).save(pairs / "train" / "001" / "blurry.png")
    PairedImageDataset(pairs / "train", 32).cache_teacher_outputs(teacher_of(2), cpu)
    assert len(asked) == 9
    assert len(list((pairs / "train" / ".cache").glob("*.answers"))) == 1


def test_a_teacher_that_was_interrupted_is_asked_about_the_rest_only(pairs, monkeypatch):
    teacher, cpu, asked = TeacherCNN(4, 8, 1, 1).eval(), torch.device("cpu"), []
    torch.nn.init.normal_(teacher.tail.weight, std=0.05)

    def counting(teacher, blurry):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(blurry.shape)
        return teacher(blurry)

    train_set = PairedImageDataset(pairs / "train", 32)
    with monkeypatch.context() as patch:
        patch.setattr("dataset.run_tiled", counting)
        with pytest.raises(KeyboardInterrupt):
            train_set.cache_teacher_outputs(teacher, cpu)
    (partial,) = (pairs / "train" / ".cache").glob(".*.answers.*.partial")
    with open(partial, "ab") as file:
        file.write(b"half of an answer")
    monkeypatch.setattr("dataset.run_tiled", lambda teacher, blurry: asked.append(blurry.shape) or teacher(blurry))
    train_set.cache_teacher_outputs(teacher, cpu)
    assert len(asked) == 3 and not list((pairs / "train" / ".cache").glob(".*.partial"))
    for index in range(3):
        expected = to_pixels(teacher(to_tensor(train_set.blurry[index])[None])[0].detach())
        assert np.array_equal(train_set.target[index], expected)


def test_a_student_told_the_blur_found_once_answers_as_one_told_the_spectrum(pairs):
    train_set, student = PairedImageDataset(pairs / "train", patch_size=32), StudentCNN().eval()
    torch.nn.init.normal_(student.make.weight, std=0.05)
    torch.nn.init.normal_(student.estimator.tail.weight, std=0.05)
    spectra = train_set.batch(range(24))
    train_set.cache_blur_embeddings(student, torch.device("cpu"))
    blurs = train_set.batch(range(24))
    assert torch.equal(spectra[0], blurs[0]) and torch.equal(spectra[1], blurs[1])
    assert spectra[2].shape == (24, 2, 64, 33) and blurs[2].shape == (24, 64 + 9 * 9)
    with torch.no_grad():
        one, other = student(spectra[0], spectra[2]), student(blurs[0], blurs[2])
    assert (one - spectra[0]).abs().max() > 0.1, "the student changes the photo"
    torch.testing.assert_close(one, other)


def test_blurs_are_found_once_for_each_gauge(pairs, monkeypatch):
    asked, find = [], StudentCNN.embed_blur
    monkeypatch.setattr(StudentCNN, "find_blur", lambda *arguments: asked.append(1) or find(*arguments))
    student, cpu = StudentCNN(), torch.device("cpu")
    for change, expected in (0, 3), (0, 3), (1, 6):  # three photos
        torch.nn.init.constant_(student.estimator.tail.bias, change)
        PairedImageDataset(pairs / "train", 32).cache_blur_embeddings(student, cpu)
        assert len(asked) == expected
    assert len(list((pairs / "train" / ".cache").glob("*.blurs"))) == 1


def test_photos_are_described_once_until_the_code_that_does_it_changes(pairs, monkeypatch):
    asked, log_power_spectrum = [], dataset.log_power_spectrum
    monkeypatch.setattr(dataset, "describe", lambda photo: asked.append(1) or log_power_spectrum(photo))
    for code, expected in ("a", 3), ("a", 3), ("b", 6):  # three photos
        monkeypatch.setattr(dataset.inspect, "getsource", lambda _, code=code: code)
        PairedImageDataset(pairs / "train", 32)
        assert len(asked) == expected
    assert len(list((pairs / "train" / ".cache").glob("*.descriptions"))) == 1


def test_half_of_the_blurred_patches_are_of_shrunk_photos(tmp_path):
    ramp = np.arange(200, dtype=np.uint8)[None, :, None].repeat(200, 0).repeat(3, 2)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    photos = SyntheticBlurDataset([tmp_path / "ramp.png"], tmp_path / "cache", 40, mixture=Mixture(identity=1))
    rises = [float(sharp.amax() - sharp.amin()) * 255 / 39 for _, sharp, _ in (photos[8 * k] for k in range(200))]
    assert all(0.99 < rise < 2.1 for rise in rises), "from the photo itself to half of its size"
    assert 0.4 < sum(rise > 1.01 for rise in rises) / 200 < 0.6


def test_validation_batches_hold_each_photo_once_and_one_size_each():
    sizes = [20] * 11 + [30] * 2 + [20]
    photos = [(torch.full((3, size, 16), float(k)), torch.zeros(3, size, 16)) for k, size in enumerate(sizes)]
    batches = list(batches_of_one_size(photos, range(len(photos))))
    assert [len(blurry) for blurry, _ in batches] == [8, 3, 2, 1]
    assert [float(image.mean()) for blurry, _ in batches for image in blurry] == list(range(14))


def damage(pairs, kind):
    folder = pairs / "train" / "002"
    if kind == "a missing half":
        (folder / "sharp.png").unlink()
    elif kind == "unequal sizes":
        Image.fromarray(dummy_photo(40, 41, 0)).save(folder / "sharp.png")
    elif kind == "an unreadable file":
        (folder / "blurry.png").write_bytes((folder / "blurry.png").read_bytes()[:100])
    elif kind == "a photo smaller than the patch":
        shutil.rmtree(folder)
        write_pair(folder, 15, 40)
    elif kind == "an empty folder":
        shutil.rmtree(pairs / "train")
        (pairs / "train").mkdir()
    elif kind == "no folder":
        shutil.rmtree(pairs / "train")


@pytest.mark.parametrize(
    "kind, sentence",
    [
        ("a missing half", r"002.sharp\.png is missing: each folder holds"),
        ("unequal sizes", r"002: blurry\.png is 43x43, sharp\.png is 41x40"),
        ("an unreadable file", r"002.blurry\.png cannot be read as a picture"),
        ("a photo smaller than the patch", r"002: 40x15 is smaller than the patch of 16: lower PATCH_SIZE"),
        ("an empty folder", r"train holds no pairs: put them there as"),
        ("no folder", r"train is not a folder: put pairs there as"),
    ],
)
def test_bad_data_is_one_sentence(pairs, kind, sentence):
    damage(pairs, kind)
    with pytest.raises(UserError, match=sentence):
        PairedImageDataset(pairs / "train", patch_size=16)


def test_all_problems_of_a_folder_are_listed_at_once(pairs):
    damage(pairs, "unequal sizes")
    write_pair(pairs / "train" / "004", 10, 30)
    with pytest.raises(UserError, match=r"(?s)2 problems.*002: blurry\.png is.*004: 30x10 is smaller"):
        PairedImageDataset(pairs / "train", patch_size=16)


def test_a_changed_photo_is_noticed(pairs):
    PairedImageDataset(pairs / "val")
    for name in "blurry.png", "sharp.png":
        Image.fromarray(dummy_photo(20, 21, seed=5)).save(pairs / "val" / "001" / name)
    assert PairedImageDataset(pairs / "val")[0][0].shape == (3, 20, 21)


def test_photos_blurred_on_the_fly_are_seeded_and_whole_ones_always_alike(pairs, tmp_path):
    paths = find_photos(pairs / "train")
    sets = [SyntheticBlurDataset(paths, tmp_path / "cache", patch_size=16, seed=seed) for seed in (1, 1, 2)]
    items = [[s[k] for k in range(6)] for s in sets]
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(items[0], items[1], strict=True))
    assert not all(torch.equal(a[0], b[0]) for a, b in zip(items[0], items[2], strict=True))
    assert items[0][0][0].shape == (3, 16, 16)
    whole = SyntheticBlurDataset(paths, tmp_path / "cache")
    assert all(torch.equal(whole[k][0], whole[k][0]) for k in range(len(whole)))
    assert [s.shape for _, s in whole] == [s.shape for _, s in SyntheticBlurDataset(paths, tmp_path / "cache")]


def test_a_patch_is_blurred_with_its_surroundings(tmp_path):
    """In a photo that is one ramp, a mirrored border would flatten the edge of a blurred patch."""
    ramp = np.tile(np.arange(0, 240, 2, dtype=np.uint8)[None, :, None], (120, 1, 3))
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    soft = Mixture(identity=0, blurs={"gaussian": 1.0}, sigma=(3.0, 3.01), linear_light=0, then_rescale=0, noise=0, jpeg=0)
    patches = SyntheticBlurDataset([tmp_path / "ramp.png"], tmp_path / "cache", patch_size=32, mixture=soft)
    errors = [float((patches[k][0] - patches[k][1]).abs().mean() * 255) for k in range(30)]
    assert np.median(errors) < 0.05, "away from the photo's border a blurred ramp is the ramp"


def test_photos_smaller_than_the_patch_are_refused(pairs, tmp_path):
    with pytest.raises(UserError, match="smaller than the patch of 44: lower PATCH_SIZE"):
        SyntheticBlurDataset(find_photos(pairs / "train"), tmp_path / "cache", patch_size=44)


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_demo_data_is_made_where_there_are_no_pairs_and_only_once(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "README.md").write_text("the layout")
    demo = find_or_make_data(tmp_path / "data")
    assert "demo data" in capsys.readouterr().out
    train_set, val_set = PairedImageDataset(demo / "train", 128), PairedImageDataset(demo / "val")
    assert (len(train_set), len(val_set)) == (32, 8)
    assert not torch.equal(*val_set[0]), "the demo's photos are blurry"
    before = contents(demo)
    assert find_or_make_data(tmp_path / "data") == demo and contents(demo) == before
    shutil.rmtree(demo)
    find_or_make_data(tmp_path / "data")
    again = contents(demo)
    assert all(again[path] == pixels for path, pixels in before.items() if path.suffix == ".png"), "the demo is seeded"


def test_the_users_files_are_never_touched_by_demo_data(pairs, tmp_path):
    before = contents(pairs)
    assert find_or_make_data(pairs) == pairs
    with pytest.raises(UserError, match="holds files that are not demo data"):
        make_demo_data(pairs)
    assert contents(pairs) == before


def test_pairs_outside_train_and_val_are_pointed_out(tmp_path):
    write_pair(tmp_path / "data" / "001")
    with pytest.raises(UserError, match="001.blurry.png is not where it is looked for: move pairs to"):
        find_or_make_data(tmp_path / "data")
