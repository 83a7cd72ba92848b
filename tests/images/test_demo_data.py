import shutil
from pathlib import Path

import pytest
import torch
from conftest import write_pair

from dataset import PairedImageDataset
from images import demo_data
from images.demo_data import find_or_make_data, make_demo_data
from utils import UserError


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


def test_the_users_files_are_never_touched_by_demo_data(pairs, monkeypatch):
    monkeypatch.setattr(demo_data, "PHOTOS", {"train": {"rocket.jpg": 1}, "val": {"rocket.jpg": 1}})  # 40 tiles take long
    before = contents(pairs)
    assert find_or_make_data(pairs) == pairs
    with pytest.raises(UserError, match="data cannot be written .*not empty"):
        make_demo_data(pairs)
    assert contents(pairs) == before


def test_what_cannot_be_listed_or_is_no_folder_is_not_taken_for_no_data(tmp_path, monkeypatch):
    (tmp_path / "train").touch()
    assert find_or_make_data(tmp_path) == tmp_path
    (tmp_path / "train").unlink()
    (tmp_path / "train").mkdir()
    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(PermissionError):
        find_or_make_data(tmp_path)


def refuse(path):
    raise PermissionError(13, "Permission denied", str(path))


def test_pairs_outside_train_and_val_are_pointed_out(tmp_path):
    write_pair(tmp_path / "data" / "001")
    with pytest.raises(UserError, match="001.blurry.png is not in .*train/NNN"):
        find_or_make_data(tmp_path / "data")


@pytest.mark.parametrize(
    "folder, data, said",
    [
        ("data", "my_dtaa", "my_dtaa does not exist: set DATA to a folder with train/ and val/, or to 'data'"),
        ("data/Train/001", "data", "Train.001.blurry.png is not in .*train/NNN"),
        ("data/train/001", "data/train", "is not in .*train/NNN or .*: move it there, or change DATA"),
    ],
)
def test_a_mistyped_folder_is_not_taken_for_no_data(tmp_path, folder, data, said):
    write_pair(tmp_path / folder)
    with pytest.raises(UserError, match=said):
        find_or_make_data(tmp_path / data)
    assert not list(tmp_path.rglob("demo"))
