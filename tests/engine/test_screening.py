"""A hostile or broken client's update is dropped, named and counted; the others are averaged as if it had not come."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tap_jax import blocks
from tap_jax import experiment as experiments
from tap_jax.cli.terminal import Terminal
from tap_jax.engine import packed, screening
from tap_jax.engine.checkpointing import Checkpoints
from tap_jax.engine.cohort import Cohort
from tap_jax.engine.local_training import Losses
from tap_jax.errors import UserError
from tests.engine.test_packed import CLIENTS, LIKE, NAMES, TASKS, draw, masks, owners, partition, seeds
from tests.trajectories import run_by

# Both tasks are of one task group, so that there is less to compile: what is trained plays no part here.
ROWS = ({"tiny_imagenet": 0.3}, {"tiny_imagenet": 0.4, "cifar100": 0.5})
METHODS = ("tap", "fedavg", "per_fedavg", "disentafl", "feddat", "centralised")
HOSTILE = 1


def flat(block) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(block)]).astype(np.float64)


@settings(max_examples=20, deadline=None)
@given(masks, owners, seeds, st.sampled_from([0.0, 3.0]))
def test_verdicts_are_those_of_a_loop_over_clients(touches, tasks, seed, max_norm):
    """Private blocks neither count nor matter."""
    rng = np.random.default_rng(seed)
    public = partition(touches, tasks)
    p = public.with_private(NAMES[1:3])
    like = LIKE | {blocks.PRIVATE + name: LIKE[name] for name in NAMES[1:3]}
    server = draw(rng) | {blocks.PRIVATE + name: draw(rng)[name] for name in NAMES[1:3]}
    clients, samples = [], rng.integers(0, 3, CLIENTS)
    for k in range(CLIENTS):
        scale = rng.choice([0.01, 1.0, 1e30])
        mine = {
            name: jax.tree.map(lambda x, s=scale: (x + s * rng.normal(size=x.shape)).astype(np.float32), server[name])
            for name in p.blocks_of(k)
        }
        for name in rng.permutation(list(mine))[: rng.choice([0, 0, 1])]:
            jax.tree.leaves(mine[name])[0][0] = rng.choice([np.nan, np.inf])
        clients.append(mine)
    steps = rng.integers(0, 3, (CLIENTS, TASKS))
    plain = np.where(rng.random((CLIENTS, TASKS)) < 0.1, np.nan, 1.0).astype(np.float32) * (steps > 0)
    layout, server_layout = packed.lay_out(p, p.owned), packed.server_layout(p)
    both = packed.pack(p, server_layout, [server], like), packed.pack(p, layout, clients, like)
    sent = p.owned & p.sent & (samples > 0)[:, None]

    norm = screening.update_norms(*both, server_layout, layout, sent)
    heard, found = screening.screen(both[1], layout, sent, Losses(plain, plain, steps), norm, max_norm)

    for k in range(CLIENTS):
        names = [name for name in clients[k] if not name.startswith(blocks.PRIVATE) and samples[k]]
        moves = [flat(clients[k][name]) - flat(server[name]) for name in names]
        length = np.sqrt(sum((move**2).sum() for move in moves))
        finite = all(np.isfinite(flat(clients[k][name])).all() for name in names)
        if not finite:
            why = "blocks not finite"
        elif not np.isfinite(plain[k]).all():
            why = "loss not finite"
        elif length > (max_norm or 1e19):  # whose square float32 cannot hold
            why = "norm too large"
        else:
            why = None
            np.testing.assert_allclose(found.norm[k], length, rtol=1e-5)
        assert (["", *screening.REASONS][found.reason[k]] or None) == why
        assert heard[k] == (why is None and steps[k].any())


def hostile(monkeypatch, change, *, client=HOSTILE, rounds=None):
    """The client sends `change` of what it has trained; returns a list to which every aggregation is added."""
    train, aggregate, sent = Cohort.train, Cohort.aggregate, []

    def changed(self, state, params, phase, **kwargs):
        state, params, losses = train(self, state, params, phase, **kwargs)
        if phase == "federated" and client in self.clients and (rounds is None or self.round in rounds):
            (position,) = np.flatnonzero(self.clients == client)
            mine = {
                group: (at == position).reshape(params[group].shape[:2]) for group, at in self.flat_layout.owner.items()
            }
            params = {group: jnp.where(mine[group][..., None], change(leaf), leaf) for group, leaf in params.items()}
        return state, params, losses

    def seen(self, state, params, losses):
        sent.append(types.SimpleNamespace(before=self.engine.server_blocks(state.server), clients=self.unload(params)))
        return aggregate(self, state, params, losses)

    monkeypatch.setattr(Cohort, "train", changed)
    monkeypatch.setattr(Cohort, "aggregate", seen)
    return sent


def mean_without(experiment, sent, left_out) -> dict:
    """The server's blocks by the definition: mean over who sent a block, weighted by samples; else as before."""
    expected = {}
    for name, before in sent.before.items():
        holders = [k for k, mine in sent.clients.items() if name in mine and k not in left_out]
        if name.startswith(blocks.PRIVATE):
            holders = []
        weights = np.array([experiment.data.clients[k].samples for k in holders], np.float64)
        parts = [
            weight / weights.sum() * flat(sent.clients[k][name]) for k, weight in zip(holders, weights, strict=True)
        ]
        expected[name] = sum(parts) if parts else flat(before)
    return expected


@pytest.mark.parametrize("method", METHODS)
def test_no_method_lets_a_bad_update_through(tiny, monkeypatch, method):
    fields = {"method": method, "screening.max_norm": 50.0, "feddat.bottleneck": 2}
    experiment = experiments.build(tiny(ROWS, fields))
    client = 0 if method == "centralised" else HOSTILE
    state = experiment.init()
    for change, why in (
        (lambda x: x + 1e3, "norm too large"),
        (lambda x: x * np.nan, "blocks not finite"),
        (lambda x: x, None),
    ):
        with monkeypatch.context() as patch:
            sent = hostile(patch, change, client=client)
            after, line = experiment.round(state)
        (found,) = sent
        assert [(entry["client"], entry["why"]) for entry in line["dropped"]] == ([(client, why)] if why else [])
        server = experiment.engine.server_blocks(after.server)
        expected = mean_without(experiment, found, [client] if why else [])
        for name in server:
            np.testing.assert_allclose(flat(server[name]), expected[name], rtol=1e-5, atol=1e-6)
            owners = [k for k in found.clients if name in found.clients[k]]
            if (why and owners == [client]) or name.startswith(blocks.PRIVATE):
                jax.tree.map(np.testing.assert_array_equal, server[name], found.before[name])
        moves = {
            k: [flat(tree) - flat(found.before[b]) for b, tree in mine.items() if not b.startswith(blocks.PRIVATE)]
            for k, mine in found.clients.items()
        }
        for k, norm in line["update_norms"].items():
            length = np.linalg.norm(np.concatenate(moves[int(k)]))
            assert norm is None if np.isnan(length) else norm == pytest.approx(length, rel=1e-4)


FIELDS = {"method": "fedavg", "rounds": 4}


def train(experiment, workdir):
    said = run_by(experiment, workdir)
    return said, [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_goes_on_without_the_update_and_tells(tiny, monkeypatch, tmp_path):
    """Or stops where it is told to, with its checkpoints whole, and can be taken up again."""
    experiment = experiments.build(tiny(ROWS, FIELDS))
    hostile(monkeypatch, lambda x: x * np.inf, rounds=(1, 3))
    _, lines = train(experiment, tmp_path / "drop")
    assert [[entry["client"] for entry in line["dropped"]] for line in lines] == [[], [HOSTILE], [], [HOSTILE]]
    assert all("update_norms" not in line and "epsilon" not in line for line in lines)
    results = json.loads((tmp_path / "drop" / "results.json").read_text())
    assert results["screening"] == {"updates": 8, "dropped": 2, "clients": {"1": {"blocks not finite": 2}}}
    assert "Updates dropped before aggregation: 2 of 8" in (tmp_path / "drop" / "report.md").read_text()

    strict = experiments.build(tiny(ROWS, FIELDS | {"screening.on_broken": "stop"}))
    strict.engine.train_program = experiment.engine.train_program  # training knows of no screening: compiled once
    with pytest.raises(UserError, match=r"screening.on_broken: .*round 2 .*client 1 \(blocks not finite\).*'drop'"):
        train(strict, tmp_path / "stop")
    assert Checkpoints(tmp_path / "stop" / "checkpoints").steps()[-1] == 1
    assert not (tmp_path / "stop" / "results.json").exists()
    said, again = train(experiment, tmp_path / "stop")
    assert "resuming after round 1 of 4" in said
    for line in lines + again:
        line.pop("seconds")
    assert again == lines


def test_the_terminal_says_so_once(capsys):
    line = {"losses": {}, "seconds": 0.1, "dropped": [{"client": 7, "why": "norm too large", "norm": 12.0}]}
    with Terminal(3, bar=False) as screen:
        for round_ in range(3):
            screen.progress(line | {"round": round_, "dropped": line["dropped"] * (round_ > 0)})
    said = [text for text in capsys.readouterr().out.splitlines() if "dropped" in text]
    assert said == ["round 2: update dropped of client 7 (norm too large); metrics.jsonl has this and any later ones"]
