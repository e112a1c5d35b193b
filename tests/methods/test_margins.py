"""Runs with the same federated models: a list of margins is as many runs, and TAP's federated models are FedAvg's."""

import dataclasses

import jax
import numpy as np
import pytest

from tap_jax import assembly
from tap_jax import experiment as experiments
from tests.oracle import Oracle
from tests.trajectories import agree, alive, play

ROWS = ({"ag_news": 0.2}, {"cifar100": 0.5, "ag_news": 0.5}, {"cifar100": 0.4})
SETTINGS = {
    "rounds": 3,
    "batch_size": 6,
    "engine.microbatch": 4,
    "optimizer.learning_rate_initial": 5e-5,
    "optimizer.learning_rate": 1e-4,
    "optimizer.post_learning_rate": 3e-5,
}
FEDAVG = ("fedavg", "fedavg+post", "fedavg+2p")
MARGINS = (0.0, 0.03, 1e6)


@pytest.fixture(scope="module")
def listed(tiny):
    """A run of three margins with everything that TAP can yield."""
    variants = ("tap", "tap-no-kd", "tap-stage1", "tap-stage2", "local", *FEDAVG)
    experiment = alive(experiments.build(tiny(ROWS, SETTINGS | {"margins": MARGINS, "variants": variants})))
    return experiment, *play(experiment)


@pytest.fixture(scope="module")
def single(tiny, listed):
    """Runs of one margin each: margin -> run. By the engine of the list, which knows of no margin: compiled once."""
    experiment, found = listed[0], {}
    for margin in MARGINS[:2]:
        config = tiny(ROWS, SETTINGS | {"margins": margin})
        method = assembly.method_of(assembly.cut(config), experiment.model)
        found[margin] = play(dataclasses.replace(experiment, config=config, method=method, variants=("tap",)))
    return found


def same_bits(one, other) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize(("margin", "label"), [(0.0, ""), (0.03, "@0.03")])
def test_each_model_of_a_list_is_that_of_a_run_of_its_own(listed, single, margin, label):
    """Blocks, histories, replacements and the finished model, bit for bit."""
    experiment, played, finished = listed
    assert experiment.variants[-2:] == ("tap@0.03", "tap@1000000")
    ours, theirs = f"personal{label}", "personal"
    for (state, line), (expected, expected_line) in zip(played, single[margin][0], strict=True):
        same_bits(state.client_models[ours], expected.client_models[theirs])
        same_bits(state.personal_loss[ours], expected.personal_loss[theirs])
        same_bits(state.replacements[ours], expected.replacements[theirs])
        same_bits(state.server, expected.server)
        mine = [{**entry, "variant": "tap"} for entry in line["replacements"] if entry["variant"] == f"tap{label}"]
        assert mine == expected_line["replacements"]
    same_bits(finished.models[f"tap{label}"], single[margin][1].models["tap"])


def test_margins_differ(listed):
    """Else the comparison above would show nothing; a margin that no loss exceeds replaces at the first time only."""
    _, played, finished = listed
    last = played[-1][0]
    often, seldom, first = (last.replacements[f"personal{label}"] for label in ("", "@0.03", "@1000000"))
    assert (often >= seldom).all() and (seldom >= first).all() and often.sum() > first.sum()
    np.testing.assert_array_equal(first, np.isfinite(last.local_loss))
    blocks = [jax.tree.leaves(finished.models[variant]) for variant in ("tap", "tap@1000000")]
    assert any(not np.array_equal(a, b) for a, b in zip(*blocks, strict=True))


def test_ablations_equal_the_oracle(listed):
    """Stage 1 alone is the model as it stands; Stage 2 alone distils the model that never communicates."""
    experiment, played, finished = listed
    reference = Oracle(experiment)
    reference.margin = lambda o: MARGINS[0]
    for t, (_, line) in enumerate(played):
        reference.round(t, line["clients"])
    for i in range(len(ROWS)):
        same_bits(finished.models["tap-stage1"][i], played[-1][0].client_models["personal"][i])
        same_bits(finished.models["local"][i], played[-1][0].client_models["local"][i])
        for variant, expected in reference.finish(i, len(played)).items():
            assert agree(finished.models[variant][i], expected, experiment.initial_blocks), (variant, i)


def test_the_federated_models_of_tap_are_those_of_fedavg(tiny, listed, single):
    """Bit for bit: the server's blocks after every round, and the models of FedAvg with and without post-training."""
    plain = alive(experiments.build(tiny(ROWS, SETTINGS | {"method": "fedavg", "variants": FEDAVG})))
    played, finished = play(plain)
    for t, (state, line) in enumerate(played):
        for run in (listed[1], single[0.03][0]):
            assert run[t][1]["losses"]["federated"] == line["losses"]["federated"]
            same_bits(run[t][0].server, state.server)
    for variant in FEDAVG[1:]:
        same_bits(listed[2].models[variant], finished.models[variant])
