import os

import pytest

from images.files import atomic, resumable_file
from utils import UserError


def test_an_interrupted_file_continues_where_it_was(tmp_path):
    with pytest.raises(KeyboardInterrupt), resumable_file(tmp_path / "a.txt") as file:
        file.write(b"one ")
        raise KeyboardInterrupt
    assert not (tmp_path / "a.txt").exists()
    with resumable_file(tmp_path / "a.txt") as file:
        file.write(b"two")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "one two")]


def test_a_folder_is_listed_once_for_many_writes_and_old_leftovers_are_removed(tmp_path, monkeypatch):
    names = ".sharpening-a", ".sharpening-b", ".sharpening-c", ".download", ".d.outputs"
    old, young, slow, foreign, resumable = (tmp_path / f"{name}.partial" for name in names)
    for path in old, young, slow, foreign:
        path.mkdir()
        (path / "half.txt").touch()
    resumable.touch()
    # slow: a long video, of which a frame was written just now; foreign: of another program
    for path in old, old / "half.txt", slow, foreign, foreign / "half.txt", resumable:
        os.utime(path, (1, 1))
    listed, glob = [], type(tmp_path).glob
    monkeypatch.setattr(type(tmp_path), "glob", lambda self, *_, **__: listed.append(self) or glob(self, *_, **__))
    for k in range(5):
        with atomic(tmp_path / f"{k}.txt") as partial:
            partial.write_text("all")
    assert listed == [tmp_path] and not old.exists()
    assert all(path.exists() for path in (young, slow, foreign / "half.txt", resumable))


def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(UserError, match="file.txt cannot be written .*No space left"), atomic(path) as partial:
        partial.write_text("half")
        raise OSError(28, "No space left on device")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_grow_is_one_sentence(tmp_path):
    sentence = r"a\.txt cannot be written .*No space left.*: free some disk space"
    with pytest.raises(UserError, match=sentence), resumable_file(tmp_path / "a.txt"):
        raise OSError(28, "No space left on device")


def test_a_name_as_long_as_the_disk_takes_can_be_written(tmp_path):
    for name in "a" * 251 + ".txt", "ä" * 125 + ".txt":
        with atomic(tmp_path / name) as partial:
            partial.write_text("all")
        assert [path.name for path in tmp_path.iterdir()] == [name]
        (tmp_path / name).unlink()


def test_a_name_of_bytes_that_the_locale_cannot_spell_is_taken_as_it_is(tmp_path):
    with atomic(tmp_path / "\udcc3\udca9.png") as partial:
        partial.touch()
    assert partial.name == "\udcc3\udca9.png", "in the POSIX locale the name cannot be written as a letter"
