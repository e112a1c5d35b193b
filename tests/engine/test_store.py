"""Models on disk: the same bits as in memory, rows in use never change, and a kill costs nothing."""

import dataclasses
import gc
import os
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tap_jax import experiment as experiments
from tap_jax.assembly import cut
from tap_jax.blocks import Partition
from tap_jax.config import to_json
from tap_jax.engine import rounds
from tap_jax.engine.checkpointing import Checkpoints
from tap_jax.engine.store import Store, StoredModels, commit, release
from tap_jax.errors import UserError
from tap_jax.methods.base import put_models
from tests.test_resume import without_time
from tests.trajectories import run_by

CLIENTS = 5
# Two blocks of one group, one of another; a page holds many rows of neither.
LIKE = {
    name: {"w": jax.ShapeDtypeStruct((3, 7), np.float32), "b": jax.ShapeDtypeStruct((2,), np.float32)} for name in "ab"
}
LIKE |= {"c": jax.ShapeDtypeStruct((5000,), np.float32)}
OWNED = np.array([[1, 1], [1, 0], [0, 1], [1, 1], [1, 0]], bool)
PARTITION = Partition(tuple("abc"), ("twins", "twins", "large"), np.array([[1, 0, 0], [0, 1, 1]], bool), OWNED)


def drawn(rng, names):
    """Values for the named blocks."""
    return {n: jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), LIKE[n]) for n in names}


def same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.fixture
def start():
    return drawn(np.random.default_rng(0), "abc")


@pytest.fixture
def models(tmp_path, start):
    return Store.create(tmp_path / "blocks", PARTITION, start, LIKE).models()


def in_memory(start):
    return tuple({name: start[name] for name in PARTITION.blocks_of(k)} for k in range(CLIENTS))


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_history_has_the_bits_of_the_one_in_memory(tmp_path_factory, data):
    """Updates, forgotten and kept states, checkpoints, and processes that come back after a kill."""
    folder, rng = tmp_path_factory.mktemp("store") / "blocks", np.random.default_rng(data.draw(st.integers(0, 99)))
    start = drawn(rng, "abc")
    models, expected, step = Store.create(folder, PARTITION, start, LIKE).models(), in_memory(start), 0
    states, saved = [], {}
    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["put", "put", "put", "keep", "forget", "save", "kill"]))
        if action == "put":
            clients = data.draw(st.sets(st.integers(0, CLIENTS - 1), min_size=1))
            update = {k: drawn(rng, PARTITION.blocks_of(k)) for k in clients}
            models, expected = put_models(models, update), put_models(expected, update)
        elif action == "keep":
            states.append((models, expected))
        elif action == "forget" and states:
            states.pop(data.draw(st.integers(0, len(states) - 1)))
        elif action == "save":
            step += 1
            models.store.commit(step, [models])
            saved[step] = (models.rows, models.sums, expected)
            saved = {s: saved[s] for s in sorted(saved)[-2:]}
            models.store.release(list(saved))
        elif action == "kill" and saved:  # all that is not saved is lost; the checkpoint before must do as well
            states, store = [], Store(folder, PARTITION, LIKE)
            step = data.draw(st.sampled_from(sorted(saved)))
            saved = {s: saved[s] for s in saved if s <= step}
            models, expected = StoredModels(store, *saved[step][:2]), saved[step][2]
    for found, wanted in (*states, (models, expected)):
        models.store.verify(found)
        for mine, theirs in zip(found, wanted, strict=True):
            same(mine, theirs)
    for rows, sums, wanted in saved.values():
        old = StoredModels(models.store, rows, sums)
        models.store.verify(old)
        for mine, theirs in zip(old, wanted, strict=True):
            same(mine, theirs)


def test_a_federation_that_has_not_trained_takes_one_copy(models, start):
    assert models.store.size_bytes() == 4 * (2 * 23 + 5000)
    for mine, theirs in zip(models, in_memory(start), strict=True):
        same(mine, theirs)


def test_rows_are_used_again_once_nothing_refers_to_them(models):
    rng, store = np.random.default_rng(1), models.store
    for _ in range(200):
        models = put_models(models, {k: drawn(rng, PARTITION.blocks_of(k)) for k in (0, 3)})
    owned = 4 * (PARTITION.owned @ [23, 23, 5000]).sum()
    assert store.size_bytes() < 2 * owned
    # Whoever keeps every state keeps every row.
    kept = [models]
    for _ in range(20):
        kept.append(put_models(kept[-1], {0: drawn(rng, "abc")}))
    assert store.size_bytes() > 20 * 4 * 5000
    before = store.size_bytes()
    del kept
    gc.collect()
    for _ in range(20):
        models = put_models(models, {0: drawn(rng, "abc")})
    assert store.size_bytes() == before


def test_rows_of_kept_checkpoints_are_not_used_again(models):
    rng, store = np.random.default_rng(2), models.store
    models = put_models(models, {0: drawn(rng, "abc")})
    store.commit(1, [models])
    rows, sums, mine = models.rows, models.sums, models[0]
    for step, steps, survives in ((1, [], True), (1, [1], True), (2, [1], True), (2, [1, 2], True), (3, [2, 3], False)):
        if step > 1:
            store.commit(step, [models])
        store.release(steps)
        for _ in range(5):
            models = put_models(models, {0: drawn(rng, "abc")})
        old = StoredModels(store, rows, sums)
        if survives:
            store.verify(old)
            same(old[0], mine)
        else:
            with pytest.raises(UserError, match="block . of client 0 is damaged"):
                store.verify(old)
        del old


def test_a_checkpoint_that_is_still_being_written_counts(models):
    rng, store = np.random.default_rng(3), models.store
    models = put_models(models, {0: drawn(rng, "abc")})
    store.commit(7, [models])
    rows, sums, mine = models.rows, models.sums, models[0]
    store.release([5, 8])  # the second is damaged: it is given up when this one is written
    for _ in range(5):
        models = put_models(models, {0: drawn(rng, "abc")})
    same(StoredModels(store, rows, sums)[0], mine)


def test_blocks_read_are_copies(models):
    rng = np.random.default_rng(4)
    models = put_models(models, {0: drawn(rng, "abc")})
    mine = models[0]
    before = jax.tree.map(np.array, mine)
    for _ in range(10):
        models = put_models(models, {0: drawn(rng, "abc")})
    same(mine, before)


def test_as_a_pytree_it_is_its_tables(models):
    leaves, structure = jax.tree.flatten(models)
    assert [(leaf.shape, leaf.dtype) for leaf in leaves] == [((CLIENTS, 3), np.int64), ((CLIENTS, 3), np.uint32)]
    again = structure.unflatten(leaves)
    assert isinstance(again, StoredModels) and again.store is models.store
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path({"personal": models})]
    assert paths == ["['personal'].rows", "['personal'].sums"]


def test_a_full_disk_leaves_the_models_as_they_were(models, monkeypatch):
    rng = np.random.default_rng(5)
    models = put_models(models, {0: drawn(rng, "abc")})
    before, written, whole = [models[k] for k in range(CLIENTS)], [], os.pwrite

    def full(descriptor, data, at):
        if len(written) > 1:
            raise OSError(28, "No space left on device")
        written.append(at)
        return whole(descriptor, data, at)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        put_models(models, {k: drawn(rng, PARTITION.blocks_of(k)) for k in range(CLIENTS)})
    monkeypatch.undo()
    models.store.verify(models)
    for mine, theirs in zip(models, before, strict=True):
        same(mine, theirs)
    update = {1: drawn(rng, "a")}
    same(put_models(models, update)[1], update[1])


def test_short_writes_are_continued(models, monkeypatch):
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, at: whole(descriptor, data[:1000], at))
    update = {0: drawn(np.random.default_rng(6), "abc")}
    same(put_models(models, update)[0], update[0])


def test_blocks_that_a_client_has_not_are_refused(models):
    with pytest.raises(ValueError, match="client 1 has other blocks than .*c"):
        put_models(models, {1: drawn(np.random.default_rng(7), "ac")})


@pytest.mark.parametrize("damage", ["byte", "cut", "missing", "other", "about"])
def test_damage_is_found_when_a_run_goes_on(models, damage):
    folder = models.store.folder
    models = put_models(models, {0: drawn(np.random.default_rng(8), "abc")})
    victim = folder / "1.0.rows"
    content = bytearray(victim.read_bytes())
    partition, like = PARTITION, LIKE
    if damage == "byte":
        content[-1] ^= 1
        victim.write_bytes(content)
    elif damage == "cut":
        victim.write_bytes(content[:-8])
    elif damage == "missing":
        victim.unlink()
    elif damage == "about":
        (folder / "store.json").write_text("{")
    else:
        like = LIKE | {"c": jax.ShapeDtypeStruct((5001,), np.float32)}
    with pytest.raises(UserError) as error:
        store = Store(folder, partition, like)
        store.verify(StoredModels(store, models.rows, models.sums))
    assert str(error.value).startswith("workdir: ") and "\n" not in str(error.value)


def test_a_second_writer_is_refused(models):
    put_models(models, {1: drawn(np.random.default_rng(9), "a")})
    second = Store(models.store.folder, PARTITION, LIKE).models()
    assert second[1].keys() == {"a"}, "reading is free to all"
    with pytest.raises(UserError, match="another process is training"):
        put_models(second, {1: drawn(np.random.default_rng(9), "a")})


# --- runs ----------------------------------------------------------------------------------------------------------

ROWS = ({"ag_news": 0.3}, {"ag_news": 0.3}, {"ag_news": 0.4})
DISK = {"engine.host_gigabytes": 1e-9}
TAP = {"variants": ("tap", "local"), "optimizer.state": "persist", "rounds": 4, "checkpoint_every": 2}
FEDDAT = {"method": "feddat", "variants": ("feddat",), "feddat.bottleneck": 2}


def save(checkpoints, state):
    """As `rounds.run_rounds` does, and waits."""
    commit(state, state.round)
    checkpoints.save(state.round, state, {})
    release(state, checkpoints.steps())
    checkpoints.wait()


@pytest.fixture(scope="module")
def persistent(tiny):
    """On disk, where it has a folder; and optimizer states are carried from round to round."""
    return experiments.build(tiny(ROWS, TAP | DISK))


@pytest.mark.parametrize("method", ["tap", "feddat"])
def test_rounds_on_disk_are_the_rounds_in_memory(tiny, persistent, tmp_path, method):
    """Blocks, optimizer states, losses; read back from a checkpoint; and what the last phase makes of them."""
    experiment = persistent if method == "tap" else experiments.build(tiny(ROWS, FEDDAT | DISK))
    memory, disk = experiment.init(), experiment.init(tmp_path)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for round_ in range(4):
        (memory, line), (disk, other) = experiment.round(memory), experiment.round(disk)
        assert line == other
        if round_ % 2:
            save(checkpoints, disk)
    del disk
    disk = rounds.resume(checkpoints, experiment.init(tmp_path))
    for held, stored in ((memory.client_models, disk.client_models), (memory.moments, disk.moments)):
        assert held.keys() == stored.keys()
        for name, models in held.items():
            assert isinstance(models, tuple) and isinstance(stored[name], StoredModels)
            for mine, theirs in zip(stored[name], models, strict=True):
                same(mine, dict(theirs))
    finished = [experiment.finish(state).models for state in (disk, memory)]
    for variant, models in finished[1].items():
        for mine, theirs in zip(finished[0][variant], models, strict=True):
            same(dict(mine), dict(theirs))


@pytest.fixture(scope="module")
def experiment(tiny):
    """On disk, where it has a folder."""
    return experiments.build(tiny(ROWS, {"variants": ("tap",)} | DISK))


def test_a_run_keeps_the_form_in_which_it_began(experiment, tiny, tmp_path):
    roomy = dataclasses.replace(experiment, sections=cut(tiny(ROWS, {"variants": ("tap",)})))
    for first, second, stored in ((experiment, roomy, True), (roomy, experiment, False)):
        workdir = tmp_path / str(stored)
        # Nothing is kept of a start that never came to a checkpoint.
        second.init(workdir)
        state = first.init(workdir)
        assert (workdir / "store").exists() == stored
        save(Checkpoints(workdir / "checkpoints"), state)
        assert isinstance(second.init(workdir).client_models["personal"], StoredModels) == stored


def test_the_store_of_a_state_in_use_is_not_made_anew(experiment, tmp_path):
    state = experiment.init(tmp_path)
    models = state.client_models["personal"]
    models = models.put({0: models[0]})
    with pytest.raises(UserError, match="workdir: .*store has the personal blocks of a state that is in use"):
        experiment.init(tmp_path)
    del state, models
    gc.collect()
    experiment.init(tmp_path)


def test_without_a_folder_all_is_in_memory(experiment):
    assert isinstance(experiment.init().client_models["personal"], tuple)


def test_a_checkpoint_holds_tables_and_no_blocks(experiment, tmp_path):
    state, checkpoints = experiment.init(tmp_path), Checkpoints(tmp_path / "checkpoints")
    save(checkpoints, state)
    _, tree, _ = checkpoints.restore_latest(jax.device_get(state))
    shape = (len(ROWS), len(experiment.partition.names))
    leaves = jax.tree.leaves(tree.client_models)
    assert [(leaf.shape, leaf.dtype) for leaf in leaves] == [(shape, np.int64), (shape, np.uint32)]


def test_damaged_blocks_stop_a_resume(experiment, tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    save(checkpoints, experiment.init(tmp_path))
    like = experiment.init(tmp_path)
    for path in (tmp_path / "store" / "blocks").glob("*.rows"):
        path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(UserError, match="workdir: block .* of client 0 is damaged"):
        rounds.resume(checkpoints, like)


PROGRAM = """
import os, signal, sys, time
import jax
jax.config.update("jax_platforms", "cpu")
from tap_jax.runs import runner as runs
from tap_jax.config import load_config

config, workdir, kill_at, checkpoint = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
whole, written = os.pwrite, 0

def killed_in_the_middle(descriptor, data, at):
    global written
    written += 1
    if written == kill_at:
        whole(descriptor, data[: len(data) // 2], at)
        while checkpoint and not os.path.isdir(f"{workdir}/checkpoints/{checkpoint}"):
            time.sleep(0.01)  # it is written by another thread
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(descriptor, data, at)

os.pwrite = killed_in_the_middle
runs.run(load_config(config), workdir)
"""


def kill(config: pathlib.Path, workdir: pathlib.Path, kill_at: int, checkpoint: str) -> None:
    """A run that is killed in the middle of writing a row, not before that checkpoint is there."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(config.parent / "cache")}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, "-c", PROGRAM, str(config), str(workdir), str(kill_at), checkpoint]
    killed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr


def test_killed_while_writing_a_row_and_resumed_equals_uninterrupted(persistent, tmp_path, monkeypatch):
    config = tmp_path / "config.json"
    config.write_text(to_json(persistent.config))
    write, written = os.pwrite, []

    def counted(*args):
        written.append(args[-1])
        return write(*args)

    monkeypatch.setattr(os, "pwrite", counted)
    run_by(persistent, tmp_path / "whole")
    monkeypatch.undo()
    # Before the first checkpoint; in the last round; and, counted anew, in a process that resumed.
    for kill_at, checkpoint in ((5, ""), (len(written) - 3, "2"), (3, "2")):
        kill(config, tmp_path / "killed", kill_at, checkpoint)
    assert "resuming after round 2 of 4" in run_by(persistent, tmp_path / "killed")
    assert without_time(tmp_path / "killed") == without_time(tmp_path / "whole")
    states = [
        rounds.resume(Checkpoints(tmp_path / name / "checkpoints"), persistent.init(tmp_path / name))
        for name in ("whole", "killed")
    ]
    assert states[0].round == 4
    jax.tree.map(np.testing.assert_array_equal, states[0].server, states[1].server)
    for held, others in ((states[0].client_models, states[1].client_models), (states[0].moments, states[1].moments)):
        for name in held:
            for mine, theirs in zip(others[name], held[name], strict=True):
                same(mine, theirs)
