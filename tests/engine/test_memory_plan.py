"""What is described is what is there, to the byte where it is arrays, and no client's blocks are held twice."""

import gc
import weakref

import jax
import numpy as np

from tap_jax import assembly
from tap_jax import experiment as experiments
from tap_jax.engine.cohort import Cohort
from tap_jax.engine.memory_plan import LAST, ROUND, array_bytes
from tap_jax.experiment import Experiment
from tap_jax.planning import planned_memory
from tap_jax.planning.describe import describe
from tap_jax.planning.outline import outline
from tap_jax.runs import runner as runs

ROWS = ({"ag_news": 0.3}, {"ag_news": 0.3, "cifar100": 0.5}, {"ag_news": 0.4, "fashion_mnist": 1.0})
# Blocks that are large beside what is not described: plans, layout, losses.
FIELDS = {"variants": ("tap",), "model.width": 64, "model.mlp": 128, "data.train_size": 64, "data.test_size": 16}
PROGRAM = ("their gradients", "AdamW's two moments", "one row's blocks and gradients")  # made and dropped inside it


def test_what_is_described_is_there(tiny, monkeypatch):
    gc.collect()
    before, config = array_bytes(), tiny(ROWS, FIELDS)
    run = experiments.build(config)
    tests, state = run.evaluator.arrays, run.init()
    plan = planned_memory.plan(outline(config))
    data = sum(leaf.nbytes for leaf in jax.tree.leaves((run.engine.arrays, tests)))
    found, train = {}, run.engine.train_program

    def looked_at(*args):
        found.setdefault(len(found), array_bytes() - before)
        return train(*args)

    monkeypatch.setattr(run.engine, "train_program", looked_at)
    for clients in ((0, 1), (1, 2)):
        state, _ = run.round(state, clients)
    # The second training of a round is that of the personal blocks, beside the federated ones.
    outside = plan.on_device(ROUND) - sum(plan.phases[ROUND].parts[name] for name in PROGRAM)
    outside += data - plan.always["training and test data, at most"]
    assert 0 <= found[3] - outside < 0.03 * outside
    assert data <= plan.always["training and test data, at most"] < 1.1 * data
    # On the host: everybody has trained, so nobody's blocks are anybody else's.
    stored = {id(leaf): leaf.nbytes for leaf in jax.tree.leaves(state.client_models)}
    assert sum(stored.values()) == plan.host["personal blocks of all clients, only those they own"]
    # The bytes of parameters are those of the program's own state.
    params = Cohort.of(run.engine, (0, 1), 0).broadcast(state.server)
    size = sum(leaf.nbytes for leaf in params.values())
    parts = plan.phases[ROUND].parts
    assert parts["blocks in training"] == parts["their gradients"] == size
    assert parts["AdamW's two moments"] == 2 * size


def test_totals_add_up(tiny):
    config = tiny(ROWS, FIELDS | {"mesh.clients": 2})
    plan = planned_memory.plan(outline(config))
    assert plan.devices == 2
    one = {phase: plan.on_device(phase) for phase in (ROUND, LAST)}
    assert one[ROUND] == sum(plan.always.values()) + sum(plan.phases[ROUND].parts.values())
    host, finished = sum(plan.host.values()), sum(plan.finished.values())
    assert plan.together(ROUND) == 2 * one[ROUND] + host
    assert plan.together(LAST) == 2 * one[LAST] + host + finished and finished
    text = describe(outline(config))
    assert f"{plan.together(ROUND) / planned_memory.MIB:,.1f}" in text.split("= round, the host and all 2 devices")[1]


def test_what_goes_to_disk_is_not_in_memory(tiny):
    fields = FIELDS | {"optimizer.state": "persist"}
    memory = planned_memory.plan(outline(tiny(ROWS, fields)))
    disk = planned_memory.plan(outline(tiny(ROWS, fields | {"engine.host_gigabytes": 1e-9})))
    assert len(disk.disk) == 3 and not memory.disk
    assert disk.host | disk.disk == memory.host
    assert memory.together(ROUND) - disk.together(ROUND) == sum(disk.disk.values())
    text = describe(outline(tiny(ROWS, fields | {"engine.host_gigabytes": 1e-9})))
    assert "On disk, in the run's folder (engine.host_gigabytes)\n  personal blocks" in text


def test_where_blocks_go_by_default(tiny, monkeypatch):
    """To disk where they would take more than half of the machine, or a checkpoint would take longer than rounds."""
    config = tiny(ROWS)
    monkeypatch.setattr(assembly, "machine_memory", lambda: 1000)
    found = [assembly.engine_settings(config, clients).host_bytes for clients in (30, 300, 301, 3000)]
    assert found == [500, 500, 0, 0]
    config = tiny(ROWS, {"engine.host_gigabytes": 2.5})
    assert assembly.engine_settings(config, 3000).host_bytes == 2_500_000_000


def test_a_run_does_not_keep_the_blocks_that_it_began_with(tiny, tmp_path, monkeypatch):
    """Neither at its start nor where it goes on: that would be a second copy of everybody's blocks."""
    config = tiny(({"ag_news": 0.5}, {"ag_news": 0.5}), {"variants": ("tap",), "rounds": 2})
    held, alive = [], []

    def watched(function):
        def call(*args, **kwargs):
            state = function(*args, **kwargs)
            held.extend(
                weakref.ref(leaf) for leaf in jax.tree.leaves(state.client_models) if isinstance(leaf, np.ndarray)
            )
            return state

        return call

    def progress(line):
        gc.collect()
        alive.append(sum(leaf() is not None for leaf in held))

    monkeypatch.setattr(Experiment, "init", watched(Experiment.init))
    runs.run(config, tmp_path, runs.Reporter(say=lambda line: None, progress=progress))
    assert held and alive == [0, 0], "both clients take part in every round"
    monkeypatch.setattr(runs.rounds, "resume", watched(runs.rounds.resume))
    (tmp_path / "results.json").unlink()
    for path in (tmp_path / "checkpoints").glob("2"):
        path.rename(tmp_path / "aside")
    held.clear(), alive.clear()
    runs.run(config, tmp_path, runs.Reporter(say=lambda line: None, progress=progress))
    assert len(alive) == 1 and held and alive == [0]
