"""Files that are there whole or not at all: what is left of a write that fails, and beside one that another makes."""

import os

import pytest

from tap_jax.whole_files import replaced, write_file


@pytest.fixture
def path(tmp_path):
    """A file with something in it."""
    path = tmp_path / "file.json"
    write_file(path, "old: ä")
    assert path.read_bytes() == "old: ä".encode() and os.listdir(tmp_path) == ["file.json"]
    return path


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("bad")])
@pytest.mark.parametrize("shared", [False, True])
def test_a_write_that_fails_midway_leaves_the_old_file_alone(path, shared, error):
    with pytest.raises(type(error)) as caught, replaced(path, shared=shared) as fresh:
        fresh.write_bytes(b"ne")
        assert fresh.parent == path.parent and path.read_text(encoding="utf-8") == "old: ä"
        raise error
    assert caught.value is error
    assert path.read_text(encoding="utf-8") == "old: ä" and os.listdir(path.parent) == ["file.json"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_an_exchange_that_fails_leaves_the_old_file_alone(path, monkeypatch, step):
    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, step, fail)
        write_file(path, b"new")
    assert path.read_text(encoding="utf-8") == "old: ä" and os.listdir(path.parent) == ["file.json"]
    write_file(path, b"new")
    assert path.read_bytes() == b"new" and os.listdir(path.parent) == ["file.json"]


def test_a_full_disk(small_disk):
    write_file(small_disk / "file", "old")
    with pytest.raises(OSError, match="No space left"):
        write_file(small_disk / "file", bytes(8 * 2**20))
    assert (small_disk / "file").read_text() == "old" and os.listdir(small_disk) == ["file"]


def test_what_a_kill_left_is_written_over(path):
    (path.parent / ".file.json.tmp").write_text("half a fi")
    write_file(path, "new")
    assert path.read_text() == "new" and os.listdir(path.parent) == ["file.json"]


def test_a_shared_file_is_written_beside_another_process_s(path):
    theirs = path.parent / ".file.json.1.tmp"
    theirs.write_text("under way")
    with replaced(path, shared=True) as fresh:
        assert fresh != theirs
        fresh.write_text("ours")
    assert path.read_text() == "ours" and theirs.read_text() == "under way"
