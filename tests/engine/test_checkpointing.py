"""`Checkpoints`: bit-exact, atomic, written in the background, and damage never goes unnoticed."""

import os
import shutil
import signal
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tap_jax.engine import manifest
from tap_jax.engine.checkpointing import Checkpoints
from tap_jax.engine.manifest import under_todays_names
from tap_jax.errors import UserError

# Reading a damaged file leaves Orbax's event loop closed under a late callback; harmless, and none of ours.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def state(seed: int = 0):
    """A tree with everything that a run's state may hold."""
    rng = np.random.default_rng(seed)
    return {
        "server": {
            "mote/image/attention": {"kernel": rng.standard_normal((3, 5)).astype(np.float32)},
            "mote/image": rng.standard_normal((3, 5)).astype(np.float32),
            "head/ag_news": jnp.asarray(rng.standard_normal((2, 2)), jnp.bfloat16),
        },
        "personal": [
            {"head/ag_news": rng.standard_normal(4).astype(np.float32)},
            None,
            (jnp.arange(3, dtype=jnp.int32), np.zeros((0, 4), np.float32)),
        ],
        "large": np.asfortranarray(rng.standard_normal((300, 400)).astype(np.float32)),  # beyond PACK_BELOW
        "histories": np.array([np.inf, -np.inf, np.nan, -0.0, 1e-45], np.float32),
        "key": jax.random.key_data(jax.random.key(seed)),
        "replaced": np.array([True, False]),
        "round": np.int32(seed),
    }


def assert_same_bits(tree, expected):
    assert jax.tree_util.tree_structure(tree) == jax.tree_util.tree_structure(expected)
    for leaf, other in zip(jax.tree_util.tree_leaves(tree), jax.tree_util.tree_leaves(expected), strict=True):
        other = np.asarray(other)
        assert isinstance(leaf, np.ndarray)
        assert (leaf.shape, leaf.dtype) == (other.shape, other.dtype)
        assert leaf.tobytes() == other.tobytes()


def data_files(folder):
    """Files of a checkpoint that are not empty, the largest first."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]
    return sorted(files, key=lambda path: -path.stat().st_size)


@pytest.fixture
def two(tmp_path):
    """Checkpoints of steps 1 and 2, of different states."""
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in (1, 2):
        checkpoints.save(step, state(step), {"config": "abc", "step": step})
    checkpoints.wait()
    return checkpoints


def assert_falls_back(checkpoints):
    """Step 2 is damaged: step 1 comes back, and one line says so."""
    step, tree, metadata = checkpoints.restore_latest(state())
    assert (step, metadata["step"]) == (1, 1)
    assert_same_bits(tree, state(1))
    assert len(checkpoints.notes) == 1
    assert checkpoints.notes[0].startswith("checkpoint 2 passed over: ")
    assert "\n" not in checkpoints.notes[0]


def test_round_trip_is_bit_exact(two):
    metadata = {"config": "abc", "step": 2}
    assert two.restore_latest(state())[::2] == (2, metadata)
    assert_same_bits(two.restore_latest(state())[1], state(2))
    abstract = jax.eval_shape(lambda: jax.tree_util.tree_map(jnp.asarray, state()))
    assert_same_bits(two.restore_latest(abstract)[1], state(2))
    assert two.notes == []


def test_small_leaves_are_packed_by_entry_and_dtype():
    arrays, _ = manifest.pack({"a": [np.zeros(3), np.ones(2, np.int32), np.ones(4)], "b": np.zeros(3)})
    assert sorted(array.size for array in arrays.values()) == [2, 3, 7]


def test_keeps_the_newest_and_drops_an_abandoned_future(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    tree = {"x": np.arange(3.0)}
    for step in (1, 2, 10, 3):
        checkpoints.save(step, tree, {})
    checkpoints.wait()
    assert checkpoints.steps() == [2, 3]
    checkpoints.save(3, {"x": np.arange(4.0)}, {})
    checkpoints.wait()
    assert checkpoints.restore_latest({"x": np.zeros(4)})[0] == 3
    assert sorted(os.listdir(tmp_path)) == ["2", "3"]
    with pytest.raises(ValueError, match="keep"):
        Checkpoints(tmp_path, keep=0)


def test_no_checkpoints_is_none(tmp_path):
    assert Checkpoints(tmp_path / "none").restore_latest(state()) is None
    assert Checkpoints(tmp_path).restore_latest(state()) is None
    assert Checkpoints(tmp_path / "none").steps() == []


def test_truncated_file_falls_back(two):
    victim = data_files(two.folder / "2")[0]
    os.truncate(victim, victim.stat().st_size // 2)
    assert_falls_back(two)


def test_deleted_file_falls_back(two):
    data_files(two.folder / "2")[0].unlink()
    assert_falls_back(two)


def test_emptied_folder_falls_back(two):
    shutil.rmtree(two.folder / "2")
    (two.folder / "2").mkdir()
    assert_falls_back(two)


def test_flipped_byte_falls_back(two):
    victim = data_files(two.folder / "2")[0]
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 0x10
    victim.write_bytes(content)
    assert_falls_back(two)


def test_a_flipped_byte_anywhere_never_yields_wrong_numbers(two):
    for victim in data_files(two.folder / "2"):
        good = victim.read_bytes()
        for position in {len(good) // 4, len(good) // 2, len(good) - 1}:
            content = bytearray(good)
            content[position] ^= 0x01
            victim.write_bytes(content)
            step, tree, metadata = two.restore_latest(state())
            assert metadata["step"] == step, victim
            assert_same_bits(tree, state(step))
        victim.write_bytes(good)


def test_another_structure_is_named(two):
    for change, message in (
        (lambda tree: tree.update(more=np.zeros(2)), "has no ['more']"),
        (lambda tree: tree.pop("key"), "has ['key'], which is not expected"),
        (lambda tree: tree.update(round=np.int64(0)), "['round'] is int32[], not int64[]"),
        (lambda tree: tree.update(replaced=np.zeros(3, bool)), "['replaced'] is bool[2], not bool[3]"),
    ):
        like = state()
        change(like)
        with pytest.raises(UserError) as caught:
            two.restore_latest(like)
        assert message in str(caught.value)


def test_nothing_whole_is_an_error_of_the_user(two):
    reports = []
    for step in (1, 2):
        data_files(two.folder / str(step))[0].unlink()
    checkpoints = Checkpoints(two.folder, report=reports.append)
    with pytest.raises(UserError, match="none of 2 can be used.*delete the folder") as caught:
        checkpoints.restore_latest(state())
    assert "\n" not in str(caught.value)
    assert reports == checkpoints.notes
    assert len(reports) == 2


def test_a_checkpoint_of_another_configuration_is_passed_over(two):
    assert two.restore_latest(state(), {"step": 1})[0] == 1
    assert two.notes == ["checkpoint 2 passed over: it is of other settings or data"]
    with pytest.raises(UserError, match="none of 2 can be used .*it is of other settings or data.*choose another"):
        two.restore_latest(state(), {"config": "xyz"})


def test_tables_of_older_states_go_by_todays_names():
    old = [".server['a']", ".finite['federated']", ".finite['personal']"]
    entries = [{"path": path, "shape": [2], "dtype": "bool"} for path in old]
    assert [entry["path"] for entry in under_todays_names(entries)] == [".server['a']", ".heard"]


def test_typed_keys_are_refused(tmp_path):
    with pytest.raises(TypeError, match="key_data"):
        Checkpoints(tmp_path).save(0, {"key": jax.random.key(0)}, {})


WRITER = """
import os, pathlib, signal, sys, threading, time
import numpy as np
from tap_jax.engine.checkpointing import Checkpoints
from tap_jax.engine.manifest import under_todays_names

folder = pathlib.Path(sys.argv[1])
checkpoints = Checkpoints(folder)
checkpoints.save(1, {"x": np.full(20_000_000, 1.0, np.float32)}, {})
checkpoints.wait()

def kill_while_writing():
    while not any(path.name not in ("1",) for path in folder.iterdir()):
        time.sleep(1e-4)
    os.kill(os.getpid(), signal.SIGKILL)

threading.Thread(target=kill_while_writing, daemon=True).start()
checkpoints.save(2, {"x": np.full(20_000_000, 2.0, np.float32)}, {})
checkpoints.wait()
"""


def test_a_killed_writer_leaves_the_older_one(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    process = subprocess.run([sys.executable, "-c", WRITER, tmp_path], env=environment, capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert len(os.listdir(tmp_path)) == 2, "the writer was killed before or after writing, not during"

    checkpoints = Checkpoints(tmp_path)
    like = {"x": np.zeros(20_000_000, np.float32)}
    assert checkpoints.steps() == [1]
    step, tree, _ = checkpoints.restore_latest(like)
    assert (step, tree["x"].min(), tree["x"].max()) == (1, 1, 1)
    checkpoints.save(2, {"x": np.zeros(3, np.float32)}, {})
    checkpoints.wait()
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]


# --- in the background ---------------------------------------------------------------------------------------------


@pytest.fixture
def held(tmp_path, monkeypatch):
    """(checkpoints whose writes begin only once the event is set, the event)."""
    go, write = threading.Event(), Checkpoints._write

    def held_write(self, *args):
        assert go.wait(60)
        write(self, *args)

    monkeypatch.setattr(Checkpoints, "_write", held_write)
    yield Checkpoints(tmp_path / "checkpoints"), go
    go.set()


def test_training_goes_on_while_a_checkpoint_is_written(held):
    checkpoints, go = held
    checkpoints.save(1, state(1), {})
    assert checkpoints.steps() == []
    second = threading.Thread(target=checkpoints.save, args=(2, state(2), {}))
    second.start()
    second.join(0.2)
    assert second.is_alive()  # one at a time
    go.set()
    second.join(60)
    checkpoints.wait()
    assert checkpoints.steps() == [1, 2]
    assert_same_bits(checkpoints.restore_latest(state())[1], state(2))


def test_what_a_device_holds_is_copied_before_save_returns(held):
    checkpoints, go = held
    consume = jax.jit(lambda x: x * 0, donate_argnums=0)
    array = jnp.arange(100_000, dtype=jnp.float32) + 1
    expected = np.array(array)
    checkpoints.save(1, {"x": array}, {})
    consume(array).block_until_ready()
    go.set()
    checkpoints.wait()
    np.testing.assert_array_equal(checkpoints.restore_latest({"x": expected})[1]["x"], expected)


def test_leaving_waits_and_lets_the_error_of_the_block_through(held):
    checkpoints, go = held
    threading.Timer(0.2, go.set).start()
    with pytest.raises(KeyError, match="the block's own"), checkpoints:
        checkpoints.save(1, state(1), {})
        raise KeyError("the block's own")
    assert checkpoints.steps() == [1]
    with checkpoints:
        checkpoints.save(2, state(2), {})
    assert checkpoints.steps() == [1, 2]


def test_a_write_that_fails_is_told_by_the_next_call_and_costs_nothing_older(two, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
    for again in (lambda: two.save(4, state(4), {}), two.wait):
        two.save(2, state(3), {})  # a step that exists has to be put aside, which fails
        with pytest.raises(UserError, match="checkpoints: 2 could not be written to .* [(]Read-only file system[)]; "):
            again()
    two.wait()  # is told once
    assert_same_bits(two.restore_latest(state())[1], state(2))


def test_a_full_disk_is_one_line_and_costs_nothing_older(small_disk):
    checkpoints = Checkpoints(small_disk / "checkpoints")
    small, large = {"x": np.ones(1000, np.float32)}, {"x": np.ones(2_000_000, np.float32)}
    checkpoints.save(1, small, {})
    checkpoints.save(2, small, {})
    checkpoints.save(3, large, {})
    with pytest.raises(UserError, match="checkpoints: 3 could not .*No space left on device.*free some") as caught:
        checkpoints.wait()
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(checkpoints.folder)) == ["1", "2"]  # and what was written of 3 takes no room
    checkpoints.save(2, large, {})  # one that exists is not lost either
    with pytest.raises(UserError, match="2 could not be written"):
        checkpoints.wait()
    np.testing.assert_array_equal(checkpoints.restore_latest(small)[1]["x"], small["x"])
    assert checkpoints.restore_latest(small)[0] == 2
