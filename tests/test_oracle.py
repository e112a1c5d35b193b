"""The engine against the literal oracle: a small heterogeneous federation, from round 0 to the end of Stage 2."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from tap_jax import blocks
from tap_jax import experiment as experiments
from tap_jax.engine.cohort import Cohort
from tap_jax.tasks import KINDS
from tests import oracle
from tests.oracle import Oracle
from tests.trajectories import TOLERANCE, agree, alive, check_same, play

ROWS = (
    {"ag_news": 0.2},  # 10 samples: two steps of three, the second one short
    {"cifar100": 0.5, "ag_news": 0.7},
    {"vqa": 0.5, "fashion_mnist": 0.4},
    {"mmlu": 0.7},
    {"mmlu": 0.3, "fashion_mnist": 0.6},
)
VARIANTS = ("tap", "tap-no-kd", "local", "fedavg+post")
SETTINGS = {
    "variants": VARIANTS,
    "cohort_size": 3,
    "rounds": 3,
    "batch_size": 6,
    "post_steps": 3,
    "engine.microbatch": 6,
    # In round 2 clients 1 and 4 replace one of their two tasks each, and no other kind's margin would do for it.
    "margins.image_classification": 0.03,
    "margins.image_generation": 0.4,
    "margins.text_classification": 0.1,
    "margins.text_generation": 0.009,
    # A teacher that is hardly another model teaches little; these count beside the tasks' losses.
    "distillation.weights.image_classification": 100.0,
    "distillation.weights.image_generation": 50.0,
    "distillation.weights.text_classification": 200.0,
    "distillation.weights.text_generation": 25.0,
    # AdamW makes whole steps of gradients that are rounding noise around 0: one such step must stay below TOLERANCE.
    "optimizer.learning_rate_initial": 5e-5,
    "optimizer.learning_rate": 1e-4,
    "optimizer.post_learning_rate": 3e-5,
}


@pytest.fixture(scope="module")
def experiment(tiny):
    return alive(experiments.build(tiny(ROWS, SETTINGS)))


@pytest.fixture(scope="module")
def run(experiment):
    return play(experiment)


def test_ownership(experiment):
    """The blocks of each task are those of the routing table."""
    for task, touches in zip(experiment.model.tasks, experiment.partition.touches, strict=True):
        names = [name for name, touched in zip(experiment.partition.names, touches, strict=True) if touched]
        assert sorted(names) == oracle.blocks_of_task(task)


# The other side of every choice that the paper leaves open and the oracle knows.
OTHERWISE = {
    "optimizer.state": "persist",
    "replacement.history": "weighted",
    "replacement.scope": "exclusive",
    "replacement.first": "keep",
    "aggregation": "uniform",
    "distillation.temperature": 2.0,
    "cohort_size": 4,
    "mesh.clients": 4,
    "engine.microbatch": 4,  # minibatches of six are cut into two rows
    **{f"margins.{kind}": 1e-6 for kind in KINDS},
}


def test_engine_equals_oracle_with_every_other_choice(tiny):
    """On four devices, and in rows that hold a part of a minibatch."""
    other = alive(experiments.build(tiny(ROWS, SETTINGS | OTHERWISE)))
    assert other.engine.devices.size == 4
    check(other, play(other))


def test_engine_equals_oracle(experiment, run):
    check(experiment, run, replacements=5)


def check(experiment, run, replacements=0):
    played, finished = run
    reference, tasks = Oracle(experiment), [task.name for task in experiment.model.tasks]
    start, kept = experiment.initial_blocks, 0
    for t, (state, line) in enumerate(played):
        losses = reference.round(t, line["clients"])
        for model, found in line["losses"].items():
            assert {int(i): set(by_task) for i, by_task in found.items()} == {
                i: set(x) for i, x in losses[model].items()
            }
            for i, by_task in losses[model].items():
                for o, loss in by_task.items():
                    assert found[str(i)][o] == pytest.approx(loss, rel=TOLERANCE), (t, model, i, o)
        assert {(r["client"], r["task"]) for r in line["replacements"]} == set(reference.replaced[t])
        kept += sum(map(len, losses["federated"].values())) - len(reference.replaced[t])
        assert agree(state.server, reference.server, start), t
        for model, expected in (("personal", reference.personal), ("local", reference.local)):
            for i, mine in enumerate(expected):
                assert agree(state.client_models[model][i], mine, start), (t, model, i)
        for i, mine in enumerate(reference.mine):
            for o in (task.name for task in mine):
                k = tasks.index(o)
                assert state.local_loss[i, k] == pytest.approx(reference.h_l[i].get(o, np.inf), rel=TOLERANCE)
                assert state.personal_loss["personal"][i, k] == pytest.approx(reference.h_p[i][o], rel=TOLERANCE)
                assert state.replacements["personal"][i, k] == sum((i, o) in pairs for pairs in reference.replaced)
    assert kept > 0 and sum(map(len, reference.replaced)) > replacements, "both outcomes of equation 3 must occur"

    for i in range(len(ROWS)):
        for variant, expected in reference.finish(i, len(played)).items():
            assert agree(finished.models[variant][i], expected, start), (variant, i)


SKEWED = {
    **SETTINGS,
    "variants": ("tap", "local"),
    "rounds": 1,
    "cohort_size": 4,
    "federation.split": "dirichlet",
    "federation.alpha": 0.05,
    "aggregation": "samples",
}


@pytest.fixture(scope="module")
def skewed(tiny):
    """Four clients with mmlu, each without some of its domains."""
    return alive(experiments.build(tiny(({"mmlu": 0.25},) * 4, SKEWED)))


@pytest.mark.parametrize("aggregation", ["samples", "uniform"])
def test_experts_of_a_domain_are_averaged_over_the_clients_that_have_it(skewed, tiny, aggregation, monkeypatch):
    """And those that lack it still own the experts, for test samples of the domain."""
    if aggregation == "uniform":  # in the engine of the other: what is compiled is given the weights
        skewed = dataclasses.replace(skewed, config=tiny(({"mmlu": 0.25},) * 4, SKEWED | {"aggregation": aggregation}))
        settings = dataclasses.replace(skewed.engine.settings, aggregation=aggregation)
        monkeypatch.setattr(skewed.engine, "settings", settings)
    law = [k for k, mine in enumerate(skewed.engine.data) if "mmlu/law" in mine.streams]
    assert 0 < len(law) < 4 and skewed.partition.owned.all()
    (state, line), *_ = play(skewed)[0]
    right, wrong = Oracle(skewed), Oracle(skewed, oracle.SKEWED_FAULT)
    for one in (right, wrong):
        one.round(0, line["clients"])
    assert agree(state.server, right.server, skewed.initial_blocks)
    experts = [name for name in right.server if name.endswith("domain/law")]
    assert len(experts) == 4
    for name in experts:
        one = ({name: blocks[name]} for blocks in (state.server, right.server, wrong.server, skewed.initial_blocks))
        found, expected, diluted, start = one
        assert agree(found, expected, start) and not agree(found, diluted, start)


def test_who_lacks_a_domain_sends_fewer_bytes(skewed):
    _, line = skewed.round(skewed.init())
    sizes = np.array([4 * blocks.count(skewed.initial_blocks[name]) for name in skewed.partition.names])
    for k, mine in enumerate(skewed.engine.data):
        lacking = [domain for domain in ("law", "medicine", "moral") if f"mmlu/{domain}" not in mine.streams]
        kept = [any(name.endswith(f"domain/{domain}") for domain in lacking) for name in skewed.partition.names]
        assert line["bytes_sent"][str(k)] == sizes.sum() - sizes[kept].sum()
        assert lacking


@pytest.mark.parametrize("fault", oracle.FAULTS)
def test_the_comparison_notices(experiment, run, fault):
    """One wrong line in the oracle, and it no longer agrees with the engine."""
    wrong, start = Oracle(experiment, fault), experiment.initial_blocks
    for t, (state, line) in enumerate(run[0]):
        losses = wrong.round(t, line["clients"])
        found = [line["losses"]["federated"][str(i)][o] for i, by_task in losses["federated"].items() for o in by_task]
        same = found == pytest.approx(
            [loss for x in losses["federated"].values() for loss in x.values()], rel=TOLERANCE
        )
        pairs = zip(state.client_models["personal"], wrong.personal, strict=True)
        if not (same and agree(state.server, wrong.server, start) and all(agree(*pair, start) for pair in pairs)):
            return
    raise AssertionError("not noticed")


@pytest.mark.parametrize(("kind", "other"), itertools.combinations(KINDS, 2))
def test_a_decision_turns_on_whose_margin_it_is(experiment, run, kind, other):
    """Were those of two kinds exchanged, the run's own histories would decide otherwise."""

    def decided(margins) -> set:
        before, found = experiment.init(), set()
        for t, (state, line) in enumerate(run[0]):
            h_l, h_p = state.local_loss, before.personal_loss["personal"]
            for i, losses in line["losses"]["federated"].items():
                for k, task in enumerate(experiment.model.tasks):
                    if task.name in losses and h_l[int(i), k] + margins[task.kind] < h_p[int(i), k]:
                        found.add((t, int(i), task.name))
            before = state
        return found

    margins = experiment.config.margins.to_dict()
    assert decided(margins) == {
        (r["round"], r["client"], r["task"]) for _, line in run[0] for r in line["replacements"]
    }
    assert decided(margins | {kind: margins[other], other: margins[kind]}) != decided(margins)


@pytest.mark.parametrize(
    ("fault", "client"),
    [
        ("rate", 0),  # the rounds' rate in Stage 2
        # β of two kinds exchanged
        (("image_classification", "image_generation"), 4),
        (("image_classification", "text_classification"), 1),
        (("image_classification", "text_generation"), 3),
        (("image_generation", "text_classification"), 4),
        (("image_generation", "text_generation"), 4),
        (("text_classification", "text_generation"), 0),
    ],
)
def test_the_comparison_notices_in_the_last_phase(experiment, run, fault, client):
    played, finished = run
    state, (wrong, right) = played[-1][0], (Oracle(experiment) for _ in range(2))
    wrong.config = experiment.config.copy_and_resolve_references()
    if fault == "rate":
        wrong.config.optimizer.post_learning_rate = wrong.config.optimizer.learning_rate
    else:
        weights = wrong.config.distillation.weights
        weights[fault[0]], weights[fault[1]] = weights[fault[1]], weights[fault[0]]
    for reference in (right, wrong):
        reference.server, reference.personal = state.server, list(state.client_models["personal"])
        reference.variants = ("tap",)
        found = reference.finish(client, len(played))["tap"]
        assert agree(finished.models["tap"][client], found, experiment.initial_blocks) == (reference is right)


def test_devices_and_packed_rows_change_nothing(tiny, run):
    """Two devices, minibatches packed into rows of two sizes: the same numbers."""
    split = {"mesh.clients": 2, "engine.packing": "on", "engine.microbatch": 2}
    other = alive(experiments.build(tiny(ROWS, SETTINGS | split)))
    assert other.engine.devices.size == 2
    check_same(play(other), run, ("tap", "tap-no-kd", "fedavg+post"))

    # The same engine, with one client whose parameters are not numbers: the others do not notice. Here client 2 shares
    # a device with clients 0 and 1, none of whom has the other's first task.
    healthy = run[0][-1][0].client_models["personal"]
    for clients in ([0, 2, 3], [1, 2, 3]):
        cohort = Cohort.of(other.engine, clients, 0)
        results = {}
        for sick in (None, *clients):
            models = [
                jax.tree.map(lambda x: np.full_like(x, np.nan), m) if k == sick else m for k, m in enumerate(healthy)
            ]
            _, params, losses = cohort.train(other.init(), cohort.load(models), "personal")
            results[sick] = cohort.unload(params), dict(zip(cohort.clients, np.asarray(losses.plain), strict=True))
        for sick in clients:
            assert not np.isfinite(results[sick][1][sick]).all()
            for k in set(clients) - {sick}:
                assert np.array_equal(results[None][1][k], results[sick][1][k])
                jax.tree.map(np.testing.assert_array_equal, results[None][0][k], results[sick][0][k])
