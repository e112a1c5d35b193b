"""One's own criterion and one's own method, without a change to the package (quoted in launch/docs/extending.md)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tap_jax
from tap_jax import registry
from tap_jax.errors import UserError
from tap_jax.methods.base import LocalRule, Method, RoundMetrics
from tests.methods.oracles import FedAvg
from tests.trajectories import agree

ROWS = ({"ag_news": 0.2}, {"ag_news": 0.4}, {"ag_news": 0.4})
SETTINGS = {
    "batch_size": 6,
    "engine.microbatch": 6,
    "optimizer.learning_rate_initial": 5e-5,
    "optimizer.learning_rate": 1e-4,
    "optimizer.post_learning_rate": 1e-4,
}


def opposed(evidence):
    """Replace where W̃[i] is better on held-out samples, or where the models' gradients of the task contradict."""
    cohort, columns = evidence.cohort, []
    federated, personal = cohort.held_out_loss(evidence.federated), cohort.held_out_loss(evidence.personal)
    for task in evidence.tasks:
        one, other = (cohort.task_gradient(params, task) for params in (evidence.federated, evidence.personal))
        columns.append(cohort.inner(one, other).sum(1) < 0)
    return evidence.seen & (jnp.stack(columns, 1) | (federated + evidence.margin < personal))


def test_own_criterion(tiny):
    config = tiny(ROWS, SETTINGS | {"data.held_out": 0.25, "margins": 0.0})
    decisions = []

    def watched(evidence):
        decisions.append((evidence.cohort.clients, np.asarray(opposed(evidence))))
        return decisions[-1][1]

    experiment = tap_jax.build(config, criterion=watched)
    state, taken_part = experiment.init(), set()
    for _ in range(config.rounds):
        state, line = experiment.round(state)
        clients, decided = decisions[-1]
        expected = {int(k) for k, yes in zip(clients, decided[:, 0], strict=True) if yes or k not in taken_part}
        assert {entry["client"] for entry in line["replacements"]} == expected
        taken_part |= set(clients.tolist())
    assert len(decisions) == config.rounds
    rows = experiment.evaluate(experiment.finish(state))
    assert [(row["variant"], row["client"]) for row in rows] == [("tap", k) for k in range(len(ROWS))]


def fedprox(strength):
    """FedProx (Li et al., 2020): FedAvg whose clients are drawn back to the blocks they received."""

    def step(tools, params, optimizer, teacher):  # one local step of all clients; `optimizer`: AdamW's state
        _, received = teacher  # here the blocks that the client received
        gradient, losses = tools.gradient(params)
        gradient = jax.tree.map(lambda g, w, w0: g + strength * (w - w0), gradient, params, received)
        return *tools.update(params, optimizer, gradient), losses

    def train(cohort, state, phase, post=False):
        start, received = (cohort.broadcast(state.server) for _ in range(2))  # training uses up the first
        return cohort.train(state, start, phase, post=post, teacher=received)

    def play(cohort, state):
        state, trained, losses = train(cohort, state, "federated")
        state = cohort.aggregate(state, trained, losses)
        return state.replace(round=state.round + 1), RoundMetrics(losses.seen, federated_loss=losses.mean())

    def finish(cohort, state, variants):
        if "fedprox+post" in variants:  # "fedprox" itself is the server's blocks
            _, trained, _ = train(cohort, state, "post", post=True)
            yield "fedprox+post", cohort.unload(trained)

    return Method(client_models=(), round=play, finish=finish, rule=LocalRule(step, takes_teacher=True))


class FedProx(FedAvg):
    """The oracle."""

    name, strength = "fedprox", 300.0

    def train(self, blocks, *args, **kwargs):
        self.start = blocks
        return super().train(blocks, *args, **kwargs)

    def step(self, adam, drawn, teacher):
        losses, gradient = super().step(adam, drawn, teacher)
        pull = jax.tree.map(lambda w, start: np.float32(self.strength) * (w - start), adam.blocks, self.start)
        return losses, jax.tree.map(np.add, gradient, pull)


@pytest.fixture(scope="module")
def handed(tiny):
    """With a method that `build` is given."""
    return tap_jax.build(tiny(ROWS, SETTINGS), method=fedprox(FedProx.strength), variants=("fedprox", "fedprox+post"))


def test_own_method_by_name(tiny, handed, monkeypatch):
    """A registered method has fields in the configuration, is checked with it, and trains like the one handed over."""
    rows, names = ROWS, handed.variants
    entry = registry.MethodEntry(
        "fedprox",
        registry.federated_variants("fedprox")[:2],
        section={"strength": 0.1},
        reads=("fedprox",),
        make=lambda settings, context: fedprox(settings["fedprox"]["strength"]),
    )
    for name in registry.METHODS:
        with pytest.raises(UserError, match="already registered"):
            registry.register_method(dataclasses.replace(entry, name=name))
    with monkeypatch.context() as patch:
        patch.setitem(registry.METHODS, "fedprox", entry)
        with pytest.raises(UserError, match="variants: 'tap' does not come out of method 'fedprox'"):
            tiny(rows, SETTINGS | {"method": "fedprox", "variants": ("tap",)})
        fields = {"method": "fedprox", "fedprox.strength": FedProx.strength, "variants": ()}
        named = tap_jax.build(tiny(rows, SETTINGS | fields))
        assert named.variants == names[:1]
        states = [experiment.round(experiment.init())[0] for experiment in (handed, named)]
        jax.tree.map(np.testing.assert_array_equal, states[0].server, states[1].server)
        assert {row["variant"] for row in named.evaluate(states[1])} == {"fedprox"}


def test_own_method(handed):
    experiment, config = handed, handed.config
    state, reference = experiment.init(), FedProx(experiment)
    plain = FedAvg(experiment)
    for t in range(config.rounds):
        state, line = experiment.round(state)
        for oracle in (reference, plain):
            oracle.round(t, line["clients"])
    finished, start = experiment.finish(state), experiment.initial_blocks
    server = experiment.engine.server_blocks(state.server)
    assert agree(server, reference.server, start) and not agree(server, plain.server, start)
    for i in range(len(ROWS)):
        assert agree(finished.models["fedprox+post"][i], reference.finish(i, config.rounds)["fedprox+post"], start)
    rows = experiment.evaluate(finished)
    assert {(row["variant"], row["client"]) for row in rows} == {
        (variant, k) for variant in ("fedprox", "fedprox+post") for k in range(len(ROWS))
    }
    assert all(0 <= row["value"] <= 100 for row in rows)
