import shutil

import numpy as np
import pytest
import torch
from conftest import dummy_photo, write_pair
from PIL import Image
from torch.utils.data import DataLoader

from blur.degradations import Mixture
from dataset import PairedImageDataset, SyntheticBlurDataset, mean_squared_error
from images.photos import find_photos
from training.loop import load_batches
from utils import UserError, to_pixels, to_tensor


def test_whole_photos_come_in_order_with_their_own_sizes(pairs):
    val_set = PairedImageDataset(pairs / "val")
    assert len(val_set) == 2 and [tuple(b.shape) for b, _ in val_set] == [(3, 40, 48), (3, 43, 43)]
    for (blurry, sharp), folder in zip(val_set, sorted((pairs / "val").glob("[0-9]*")), strict=True):
        for image, name in (blurry, "blurry.png"), (sharp, "sharp.png"):
            assert image.dtype == torch.float32
            assert torch.equal(image, to_tensor(np.array(Image.open(folder / name))))
    with pytest.raises(IndexError):
        val_set[2]


def test_patches_are_the_same_place_and_orientation_of_both_photos(tmp_path):
    write_pair(tmp_path / "001", 40, 50)
    shutil.copy(tmp_path / "001" / "sharp.png", tmp_path / "001" / "blurry.png")
    train_set = PairedImageDataset(tmp_path, patch_size=16)
    photo = to_tensor(np.array(Image.open(tmp_path / "001" / "sharp.png")))
    windows = photo.unfold(1, 16, 1).unfold(2, 16, 1).permute(1, 2, 0, 3, 4).reshape(-1, 3, 16, 16)
    upright = 0
    for k in range(40):
        blurry, sharp, *_ = train_set[k]
        assert torch.equal(blurry, sharp)
        turns = [sharp.rot90(-t, (1, 2)) for t in range(4)]
        turns += [t.flip(-1) for t in turns]
        found = [bool((windows == t).flatten(1).all(1).any()) for t in turns]
        assert any(found), "a patch must be cut from the photo"
        upright += found[0]
    assert upright < 20, "patches must be rotated and flipped"


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


def test_each_pass_takes_each_photo_once(tmp_path):
    for k in range(5):
        folder = tmp_path / f"{k}"
        folder.mkdir()
        for name, gray in ("blurry.png", k), ("sharp.png", k + 1):
            Image.fromarray(np.full((16, 16, 3), gray, np.uint8)).save(folder / name)
    train_set = PairedImageDataset(tmp_path, patch_size=16)
    laps = [[round(float(train_set[5 * lap + k][0].mean()) * 255) for k in range(5)] for lap in range(4)]
    assert all(sorted(lap) == [0, 1, 2, 3, 4] for lap in laps)
    assert len({tuple(lap) for lap in laps}) > 1


def test_half_of_the_blurred_patches_are_of_shrunk_photos_and_a_fifth_of_enlarged_ones(tmp_path, monkeypatch):
    monkeypatch.setattr("dataset.vary_photo", lambda photo, generator: photo)
    ramp = np.arange(200, dtype=np.uint8)[None, :, None].repeat(200, 0).repeat(3, 2)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    photos = SyntheticBlurDataset([tmp_path / "ramp.png"], tmp_path / "cache", 40, mixture=Mixture(identity=1))
    rises = [float(sharp.amax() - sharp.amin()) * 255 / 39 for _, sharp, *_ in (photos[8 * k] for k in range(100))]
    assert all(1 / 1.85 < rise < 2.1 for rise in rises), "from 1.8 times the photo's size to half of it"
    assert 0.4 < sum(rise > 1.01 for rise in rises) / 100 < 0.6
    assert 0.1 < sum(rise < 0.99 for rise in rises) / 100 < 0.3


def test_what_is_no_pair_is_left_out_and_photos_are_named(pairs, capsys):
    (pairs / "train" / "@eaDir").mkdir()
    Image.new("RGB", (9, 9)).save(pairs / "train" / "stray.png")
    assert len(PairedImageDataset(pairs / "train")) == 3
    assert "train are left out (1, such as stray.png): each pair needs a folder" in capsys.readouterr().out


def test_a_link_whose_target_is_missing_is_named(pairs):
    (pairs / "train" / "90").symlink_to("/mnt/gone")
    with pytest.raises(UserError, match=r"(?s)1 problem .*train.90 leads to nothing: restore what it is a link to"):
        PairedImageDataset(pairs / "train")


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
    elif kind == "two folders of photos":
        shutil.rmtree(pairs / "train")
        for name in "blurry", "sharp":
            (pairs / "train" / name).mkdir(parents=True)
            Image.new("RGB", (9, 9)).save(pairs / "train" / name / "1.png")


@pytest.mark.parametrize(
    "kind, sentence",
    [
        ("a missing half", r"002.sharp\.png is missing: each folder needs"),
        ("unequal sizes", r"002: blurry\.png is 43x43, sharp\.png is 41x40"),
        ("an unreadable file", r"002.blurry\.png cannot be read as an image"),
        ("a photo smaller than the patch", r"002: 40x15 is smaller than the patch of 16: lower PATCH_SIZE"),
        ("an empty folder", r"train contains no pairs: put them there as"),
        ("two folders of photos", r"train contains folders of photos, not of pairs: prepare_data\.py pairs"),
        ("no folder", r"train contains no pairs: put them there as"),
    ],
)
def test_bad_data_is_one_sentence(pairs, kind, sentence):
    damage(pairs, kind)
    with pytest.raises(UserError, match=sentence):
        PairedImageDataset(pairs / "train", patch_size=16)


@pytest.mark.parametrize("name", ["blurry.jpg", "BLURRY.PNG", "blur.png", "Blurred.jpeg", "sharp.png", "source.txt"])
def test_a_name_that_is_nearly_right_is_named_and_after_renaming_it_is_read(pairs, name):
    folder = pairs / "val" / "001"
    (folder / "blurry.png").rename(folder / "photo")
    Image.open(folder / "photo").save(folder / name) if name != "source.txt" else (folder / name).touch()
    advice = ", rename {name} to blurry.png" if name not in ("sharp.png", "source.txt") else ""
    with pytest.raises(UserError, match=rf"blurry\.png is missing{advice.format(name=name)}: each folder needs"):
        PairedImageDataset(pairs / "val")
    if advice:
        (folder / name).rename(folder / "blurry.png")
        assert len(PairedImageDataset(pairs / "val")) == 2


def test_where_sharp_photos_are_not_needed_the_targets_stand_in_for_them(pairs):
    damage(pairs, "a missing half")
    data = PairedImageDataset(pairs / "train", patch_size=16, need_sharp=False)
    assert len(data) == 3 and np.array_equal(data.sharp[1], data.blurry[1])
    data.targets = [np.full_like(photo, 128) for photo in data.sharp]
    wanted = [mean_squared_error(photo[::4], np.full_like(photo[::4], 128)) for photo in data.blurry]
    assert data.input_mse(1) == wanted[1] and data.input_mse(0) != wanted[0]
    damage(pairs, "an unreadable file")
    (pairs / "train" / "001" / "blurry.png").unlink()
    with pytest.raises(UserError, match=r"001.blurry\.png is missing: each folder needs blurry\.png"):
        PairedImageDataset(pairs / "train", need_sharp=False)


SCENES = np.random.default_rng(0).integers(0, 256, (3, 8, 9, 1), dtype=np.uint8).repeat(16, 1).repeat(16, 2).repeat(3, 3)
NOISE = np.random.default_rng(1).normal(0, 60, SCENES[0].shape)
GRASS = np.tile(np.arange(144) % 16 // 8 * 40 + 90, (128, 1))[..., None].repeat(3, 2)


def write_halves(root, halves):
    for k, pair in enumerate(halves):
        (root / f"{k}").mkdir(parents=True)
        for name, pixels in zip(("blurry.png", "sharp.png"), pair, strict=True):
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(root / f"{k}" / name)


@pytest.mark.parametrize(
    "halves, sentence",
    [
        ([(SCENES[k], SCENES[k - 1]) for k in range(3)], "3 problems.*0: blurry.png and sharp.png show different scenes"),
        ([(scene, scene[::-1, ::-1]) for scene in SCENES], "3 problems.*show different scenes: take both from one photo"),
        ([(scene, scene) for scene in SCENES], "1 problem .*sharp.png are equal in all pairs compared: replace one"),
    ],
)
def test_halves_that_are_no_pairs_are_told_but_not_asked_of_photos_without_a_sharp_one(tmp_path, halves, sentence):
    write_halves(tmp_path, halves)
    with pytest.raises(UserError, match=f"(?s){sentence}"):
        PairedImageDataset(tmp_path, patch_size=16)
    for file in tmp_path.glob("*/sharp.png"):
        file.unlink()
    assert len(PairedImageDataset(tmp_path, need_sharp=False)) == 3


def test_halves_under_strong_noise_and_motion_or_dark_or_flat_are_still_pairs(tmp_path):
    moved = sum(np.roll(SCENES[0].astype(float), step, 1) for step in range(-15, 16)) / 31
    dark, flat = SCENES[0] / 20, 128 + NOISE / 60
    write_halves(tmp_path, [(SCENES[0] + NOISE, SCENES[0]), (moved, SCENES[0]), (dark + NOISE, dark), (flat + NOISE, flat),
                            (GRASS[:, ::-1], GRASS), (SCENES[1], SCENES[1])])  # fmt: skip
    assert len(PairedImageDataset(tmp_path)) == 6


def test_sharp_photos_that_are_equal_to_blurry_ones_can_be_scored(tmp_path):
    write_halves(tmp_path, [(scene, scene) for scene in SCENES])
    assert len(PairedImageDataset(tmp_path)) == 3


@pytest.mark.parametrize("rows, columns", [(0, 0), (1, -1), (2, 0), (-7, 3), (0, 65)])
def test_pairs_that_are_shifted_are_told(tmp_path, capsys, rows, columns):
    fine = np.random.default_rng(2).integers(0, 256, (160, 170, 1)).repeat(3, 2)
    sharp = (fine + 3 * np.roll(fine, 40, 1)) / 4
    darker = np.roll((np.roll(sharp, 1, 0) + sharp + np.roll(sharp, -1, 0)) / 6, (-rows, -columns), (0, 1))
    write_halves(tmp_path, [(image[10:140, 10:140] for image in (darker, sharp)), (SCENES[0], SCENES[0])])
    PairedImageDataset(tmp_path)
    said = "1 of 2 pairs looked at are shifted, such as {}, whose blurry.png fits if it is moved by {} rows and {} columns"
    expected = said.format(tmp_path / "0", rows, columns) + ": align them\n"
    assert capsys.readouterr().out == (expected if 1 < max(abs(rows), abs(columns)) < 65 else ""), "65 is half of a photo"


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


def test_a_patch_is_blurred_with_its_surroundings(tmp_path, monkeypatch):
    """In a photo that is one ramp, a mirrored border would flatten the edge of a blurred patch."""
    monkeypatch.setattr("dataset.vary_photo", lambda photo, generator: photo)
    ramp = np.tile(np.arange(0, 240, 2, dtype=np.uint8)[None, :, None], (120, 1, 3))
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    soft = Mixture(
        identity=0, camera=0, blurs={"gaussian": 1.0}, sigma=(3.0, 3.01), linear_light=0, then_rescale=0, noise=0, jpeg=0
    )
    patches = SyntheticBlurDataset([tmp_path / "ramp.png"], tmp_path / "cache", patch_size=32, mixture=soft)
    errors = [float((patches[k][0] - patches[k][1]).abs().mean() * 255) for k in range(30)]
    assert np.median(errors) < 0.05, "away from the photo's border a blurred ramp is the ramp"


def test_each_patch_comes_with_the_squared_error_of_its_whole_photo(pairs, tmp_path):
    train_set = PairedImageDataset(pairs / "train", 16)
    whole = [train_set.whole(k) for k in range(len(train_set))]
    errors = {round(float((blurry - sharp)[:, ::4].square().mean()), 7) for blurry, sharp in whole}
    assert {round(float(error), 7) for error in train_set[range(12)][3]} == errors
    photos = SyntheticBlurDataset(find_photos(pairs / "train"), tmp_path / "cache", 16, mixture=Mixture(identity=1))
    assert not photos[range(4)][3].any(), "photos that are left as they are"
    blurred = SyntheticBlurDataset(find_photos(pairs / "train"), tmp_path / "cache", 16, mixture=Mixture(identity=0))
    expected = [float((blurry - sharp).square().mean()) for blurry, sharp in [blurred.whole(0, 0)]]
    assert any(float(error) == pytest.approx(expected[0], rel=1e-4) for error in blurred[range(len(blurred))][3])


def test_photos_smaller_than_the_patch_are_refused(pairs, tmp_path):
    with pytest.raises(UserError, match="smaller than the patch of 44: lower PATCH_SIZE"):
        SyntheticBlurDataset(find_photos(pairs / "train"), tmp_path / "cache", patch_size=44)


def test_versions_of_a_large_photo_are_parts_of_it_whole_or_resized(tmp_path, monkeypatch):
    monkeypatch.setattr("dataset.VERSION_SIZE", 200)
    monkeypatch.setattr("dataset.vary_photo", lambda photo, generator: photo)
    pixels = np.random.default_rng(0).integers(0, 256, (420, 700, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "large.png")
    photos = SyntheticBlurDataset([tmp_path / "large.png"], tmp_path / "cache", 40, mixture=Mixture(identity=1))
    unshrunk = 0
    for version in range(12):
        blurry, sharp = photos.whole(0, version)
        assert sharp.shape == (3, 200, 200) and torch.equal(blurry, sharp)
        windows = np.lib.stride_tricks.sliding_window_view(pixels[..., 0], (4, 4))
        unshrunk += bool((windows == to_pixels(sharp)[:4, :4, 0]).all((2, 3)).any())  # it is in the photo as it is
    assert 1 <= unshrunk <= 10


def test_worker_processes_are_given_the_spectra_and_need_not_compute_them(pairs):
    train_set = PairedImageDataset(pairs / "train", patch_size=16)
    load_batches(train_set, torch.device("cpu"), range(1), 1, workers=1)
    assert "spectra" in vars(train_set)
