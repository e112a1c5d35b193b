"""What a replacement criterion asks of a cohort, and early stopping, each against the literal computation."""

import dataclasses
import functools
import types

import jax
import numpy as np
import pytest
import torch

import tap_jax
from tap_jax import experiment as experiments
from tap_jax.engine.cohort import Cohort
from tap_jax.errors import UserError
from tap_jax.experiment import Finished
from tap_jax.methods import criteria
from tap_jax.methods.criteria import Evidence, relative_margin
from tap_jax.methods.fedavg import fedavg
from tap_jax.methods.stage2 import Patience, distil
from tests.oracle import Oracle, minibatches
from tests.trajectories import alive

ROWS = ({"ag_news": 0.3}, {"cifar100": 0.5, "ag_news": 0.6}, {"cifar100": 0.4})
SETTINGS = {
    "variants": ("tap", "tap-no-kd"),
    "batch_size": 6,
    "post_steps": 4,
    "engine.microbatch": 4,
    "data.held_out": 0.3,
    "replacement.criterion": "held_out",
    "replacement.margin": "relative",
    "distillation.patience": 2,
    "distillation.look_every": 1,
    "optimizer.post_learning_rate": 0.05,  # so that some steps do harm
}


@pytest.fixture(scope="module")
def experiment(tiny):
    return alive(experiments.build(tiny(ROWS, SETTINGS)))


@pytest.fixture(scope="module")
def models(experiment):
    """Two models of every client: the initial one, and another."""
    rng = np.random.default_rng(1)
    other = jax.tree.map(
        lambda leaf: (leaf + 0.2 * rng.standard_normal(leaf.shape)).astype(np.float32), experiment.initial_blocks
    )
    names = [experiment.partition.blocks_of(k) for k in range(len(ROWS))]
    return [[{b: blocks[b] for b in mine} for mine in names] for blocks in (experiment.initial_blocks, other)]


@pytest.fixture(scope="module")
def cohort(experiment):
    return Cohort.of(experiment.engine, [0, 1], 5)


def held_out(experiment, i) -> dict[str, list]:
    """A client's held-out samples as one minibatch: task -> (domain, id)."""
    streams = {stream.name: stream for stream in experiment.model.streams}
    out = {}
    for name, ids in experiment.engine.held_out[i].streams.items():
        out.setdefault(streams[name].task.name, []).extend((streams[name].domain, int(index)) for index in ids)
    return out


def held_out_losses(experiment, blocks, i) -> dict[str, float]:
    """ℓ_o of every task on all of a client's held-out samples."""
    reference, samples = Oracle(experiment), held_out(experiment, i)
    z = reference.outputs(blocks, samples)
    return {
        o: float(
            reference.loss(
                reference.tasks[o], torch.tensor(z[o]), [reference.batch(reference.tasks[o], n) for _, n in samples[o]]
            )
        )
        for o in samples
    }


def test_held_out_samples_are_nobodys_training_samples(experiment):
    for train, held in zip(experiment.engine.data, experiment.engine.held_out, strict=True):
        assert held.streams
        for name, ids in held.streams.items():
            assert not set(ids) & set(train.streams[name])


def test_held_out_loss(experiment, models, cohort):
    found = np.asarray(cohort.held_out_loss(cohort.load(models[0])))
    names = [task.name for task in experiment.model.tasks]
    for position, i in enumerate(cohort.clients):
        expected = held_out_losses(experiment, models[0][i], i)
        for o, name in enumerate(names):
            assert found[position, o] == pytest.approx(expected.get(name, 0.0), rel=1e-5)


def test_held_out_losses_of_finished_models(experiment, models):
    """Of every client and variant; the server's blocks are the initial ones here."""
    rows = experiment.held_out_loss(Finished(experiment.init(), {"tap": tuple(models[1]), "fedavg": None}))
    found = {(row["variant"], row["client"], row["task"]): row["value"] for row in rows}
    expected = {
        (variant, i, name): loss
        for variant, blocks in (("tap", models[1]), ("fedavg", models[0]))
        for i in range(len(ROWS))
        for name, loss in held_out_losses(experiment, blocks[i], i).items()
    }
    assert found == pytest.approx(expected, rel=1e-5) and {row["metric"] for row in rows} == {"held_out_loss"}


def task_gradient(experiment, blocks, i, task):
    """∇ℓ_o on a minibatch of the client's samples of that task; None where it has none."""
    reference, data = Oracle(experiment), experiment.engine.data[i]
    names = [stream.name for stream in task.streams if stream.name in data.streams]
    if not names:
        return None
    mine = types.SimpleNamespace(streams={name: data.streams[name] for name in names})
    (minibatch,) = minibatches(mine, experiment.model.streams, experiment.config, i, 5, "probe", 1, None)
    return reference.gradient(blocks, minibatch)[1]


def test_task_gradient(experiment, models, cohort):
    for task in experiment.model.tasks:
        found = cohort.unload(cohort.task_gradient(cohort.load(models[0]), task))
        for i in cohort.clients:
            expected = task_gradient(experiment, models[0][i], i, task)
            for b, tree in found[i].items():
                for leaf, g in zip(jax.tree.leaves(tree), jax.tree.leaves((expected or found[i])[b]), strict=True):
                    np.testing.assert_allclose(leaf, 0 if expected is None else g, atol=2e-5)


@functools.cache
def represented(model):
    return jax.jit(model.represent, static_argnums=2)


def pooled(experiment, blocks, i) -> dict[str, list[np.ndarray]]:
    """Task -> what its head sees of every held-out sample, the mean of the path vectors."""
    reference, model, out = Oracle(experiment), experiment.model, {}
    for o, samples in held_out(experiment, i).items():
        task = reference.tasks[o]
        for domain, index in samples:
            parts = reference.collect(blocks, task, domain)
            vectors = represented(model)(reference.frozen, parts, task, reference.batch(task, index))
            out.setdefault(o, []).append(np.asarray(vectors)[0].mean(0))
    return out


def similarities(experiment, models, i) -> dict[str, float]:
    one, other = (pooled(experiment, blocks[i], i) for blocks in models)
    return {
        o: float(np.mean([a @ b / np.sqrt(a @ a * (b @ b)) for a, b in zip(one[o], other[o], strict=True)]))
        for o in one
    }


def test_similarity(experiment, models, cohort):
    found = np.asarray(cohort.similarity(*map(cohort.load, models)))
    same = np.asarray(cohort.similarity(cohort.load(models[0]), cohort.load(models[0])))
    for position, i in enumerate(cohort.clients):
        expected = similarities(experiment, models, i)
        for o, task in enumerate(experiment.model.tasks):
            assert found[position, o] == pytest.approx(expected.get(task.name, 0.0), abs=1e-5)
            assert same[position, o] == pytest.approx(float(task.name in expected), abs=1e-5)
    assert (np.abs(found) < 0.999).all()


def test_inner(experiment, models, cohort):
    found = np.asarray(cohort.inner(*map(cohort.load, models)))
    for position, i in enumerate(cohort.clients):
        for r, name in enumerate(experiment.partition.names):
            expected = 0.0
            if name in models[0][i]:
                pairs = zip(*(jax.tree.leaves(blocks[i][name]) for blocks in models), strict=True)
                expected = sum(float((a.astype(np.float64) * b).sum()) for a, b in pairs)
            assert found[position, r] == pytest.approx(expected, rel=1e-4, abs=1e-4)


def evidence(experiment, cohort, models, margin, **losses) -> Evidence:
    """X is the first model, W̃ the second."""
    tasks = experiment.model.tasks
    seen = experiment.partition.task_mask[cohort.clients]
    margin = np.full(len(tasks), margin, np.float32)
    given = {"federated_loss": np.zeros(seen.shape), "personal_loss": np.ones(seen.shape)} | losses
    personal, federated = map(cohort.load, models)
    return Evidence(cohort, federated, personal, margin=margin, seen=seen, tasks=tasks, **given)


def decided(experiment, cohort, decision) -> dict:
    """(client, task) -> R."""
    return {
        (int(i), task.name): bool(np.asarray(decision)[position, o])
        for position, i in enumerate(cohort.clients)
        for o, task in enumerate(experiment.model.tasks)
    }


def around(values) -> list[float]:
    """Numbers just below and just above each of the given ones."""
    return [value + d for value in values for d in (-1e-3, 1e-3)]


def test_held_out_criterion(experiment, models, cohort):
    """Equation 3 with losses on held-out samples, whatever the training losses say."""
    gain = {}
    for i in cohort.clients:
        personal, federated = (held_out_losses(experiment, blocks[i], i) for blocks in models)
        gain |= {(int(i), o): personal[o] - federated[o] for o in personal}
    for pair in (models, models[::-1]):
        for margin in around(gain.values()):
            found = decided(experiment, cohort, criteria.held_out(evidence(experiment, cohort, pair, margin)))
            assert found == {key: key in gain and gain[key] > margin for key in found}
        gain = {key: -value for key, value in gain.items()}


def test_gradient_criterion(experiment, models, cohort):
    """The cosine between the way from X[i] to W̃[i] and the descent of ℓ_o, over the blocks of B_o."""
    cosine = {}
    for i in map(int, cohort.clients):
        for o, task in enumerate(experiment.model.tasks):
            slope = task_gradient(experiment, models[0][i], i, task)
            if slope is None:
                continue
            names = [b for b, t in zip(experiment.partition.names, experiment.partition.touches[o], strict=True) if t]
            flat = lambda blocks, names=names: np.concatenate(  # noqa: E731
                [np.ravel(leaf) for name in names for leaf in jax.tree.leaves(blocks[name])]
            )
            way, down = flat(models[1][i]) - flat(models[0][i]), -flat(slope)
            cosine[i, task.name] = way @ down / (np.linalg.norm(way) * np.linalg.norm(down))
    for margin in around(cosine.values()):
        found = decided(experiment, cohort, criteria.gradient(evidence(experiment, cohort, models, margin)))
        assert found == {key: key in cosine and cosine[key] > margin for key in found}


def test_representation_criterion(experiment, models, cohort):
    """Equation 3, and models that see the held-out samples alike."""
    cosine = {(int(i), o): c for i in cohort.clients for o, c in similarities(experiment, models, i).items()}
    for least in around(cosine.values()):
        given = evidence(experiment, cohort, models, 0.5)
        found = decided(experiment, cohort, criteria.representation(given, least=least))
        assert found == {key: key in cosine and cosine[key] >= least for key in found}
    given = evidence(experiment, cohort, models, 1.5)
    assert not np.asarray(criteria.representation(given, least=-1.0)).any(), "1.5 above the loss's gain"


def test_relative_margins():
    """m times the mean of h^(l) now and at the last participation; at the first one of h^(l) now."""
    now, before = np.array([[1.0, 3.0], [2.0, 4.0]]), np.array([[2.0, np.inf], [4.0, 0.0]])
    found = relative_margin(np.array([0.1, 0.01]), now, before)
    np.testing.assert_allclose(found, [[0.15, 0.03], [0.3, 0.02]], rtol=1e-6)


def test_a_run_with_relative_margins_on_held_out_losses(experiment):
    """At the second participation R is the literal decision, from what the states before and after say."""
    state, checked = experiment.init(), 0
    names = [task.name for task in experiment.model.tasks]
    for _ in range(3):
        before = state
        state, line = experiment.round(state)
        replaced = {(entry["client"], entry["task"]) for entry in line["replacements"]}
        cohort = Cohort.of(experiment.engine, line["clients"], int(before.round))
        federated = cohort.unload(cohort.train(before, cohort.broadcast(before.server), "federated")[1])
        for i in line["clients"]:
            mine = held_out_losses(experiment, federated[i], i)
            theirs = held_out_losses(experiment, before.client_models["personal"][i], i)
            for o, now in line["losses"]["federated"][str(i)].items():
                last = before.local_loss[i, names.index(o)]
                margin = experiment.config.margins[experiment.model.tasks[names.index(o)].kind]
                scale = now if np.isinf(last) else (now + last) / 2
                expected = np.isinf(last) or mine[o] + margin * scale < theirs[o]
                assert ((i, o) in replaced) == expected
                checked += not np.isinf(last)
    assert checked


# --- Early stopping --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def course(experiment, models):
    """Stage 2 of clients 0 and 1 a step at a time: blocks and summed held-out loss after 0, 1, ... P steps."""
    cohort = Cohort.of(experiment.engine, [0, 1], 5)
    teacher = cohort.load(models[1])
    params, opt_state = cohort.load(models[0]), cohort.opt_state(experiment.init(), "distil")
    looked = [(cohort.unload(params), np.asarray(cohort.held_out_loss(params)).sum(1))]
    for step in range(experiment.config.post_steps):
        params, opt_state, _ = cohort.train_steps(
            params, opt_state, "distil", (step, step + 1), post=True, teacher=teacher
        )
        looked.append((cohort.unload(params), np.asarray(cohort.held_out_loss(params)).sum(1)))
    return looked


def of_students(experiment, models):
    """A state whose personal models are the first ones."""
    return experiment.init().replace(client_models={"personal": models[0]})


def same_bits(one, other) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


def same_but_for_rounding(one, other) -> None:
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), one, other)


def test_training_in_pieces_is_training(experiment, models, course):
    """Whatever the pieces, to the bit; and without any, by a program that keeps no optimizer states."""
    cohort = Cohort.of(experiment.engine, [0, 1], 5)
    teacher, state = cohort.load(models[1]), of_students(experiment, models)
    for steps in (3, experiment.config.post_steps):
        params, opt_state = cohort.load(models[0]), cohort.opt_state(state, "distil")
        part, *_ = cohort.train_steps(params, opt_state, "distil", (0, steps), post=True, teacher=teacher)
        same_bits(cohort.unload(part), course[steps][0])
    _, whole, _ = cohort.train(state, cohort.load(models[0]), "distil", post=True, teacher=teacher)
    same_but_for_rounding(cohort.unload(whole), course[-1][0])
    same_but_for_rounding(distil(cohort, state, "personal", teacher), course[-1][0])


@pytest.mark.parametrize("looks", [1, 2, 1000])
@pytest.mark.parametrize("every", [1, 3])
def test_a_client_keeps_its_best_look(experiment, models, course, looks, every):
    """The rule in words, client by client: stop after so many looks without a new best; the best one counts."""
    cohort = Cohort.of(experiment.engine, [0, 1], 5)
    patience = Patience(experiment.config.post_steps, every, looks)
    found = distil(cohort, of_students(experiment, models), "personal", cohort.load(models[1]), patience)
    steps = [*range(0, experiment.config.post_steps, every), experiment.config.post_steps]
    for position, i in enumerate(map(int, cohort.clients)):
        best, stale = 0, 0
        for step in steps[1:]:
            if course[step][1][position] < course[best][1][position]:
                best, stale = step, 0
            else:
                stale += 1
            if stale == looks:
                break
        same_bits(found[i], course[best][0][i])


def test_the_course_has_ups_and_downs(course):
    """Else every rule of stopping would do."""
    losses = np.array([loss for _, loss in course])
    assert (np.diff(losses, axis=0) > 0).any() and (np.argmin(losses, 0) > 0).any(), losses


def test_a_client_without_held_out_samples_is_distilled(tiny):
    """Too few samples to hold one out: nothing says when to stop, so it takes all its steps."""
    rows = ({"ag_news": 0.02}, {"ag_news": 0.6})
    experiment = alive(experiments.build(tiny(rows, SETTINGS)))
    assert not experiment.engine.held_out[0].streams
    state = experiment.init()
    stopped = experiment.finish(state).models["tap"][0]
    plain = dataclasses.replace(experiment, method=plain_tap(experiment)).finish(state).models["tap"][0]
    same_but_for_rounding(stopped, plain)


def test_stage_2_without_a_teacher_has_the_same_patience(experiment, monkeypatch):
    """Else the ablation would differ from TAP in more than distillation."""
    asked = []

    def noted(cohort, state, model, teacher, patience):
        asked.append((model, teacher is not None, patience))
        return {}

    monkeypatch.setattr("tap_jax.methods.tap.distil", noted)
    passes = {variant for _, variant, _ in experiment.finish_in_batches(experiment.init())}
    patience = Patience(experiment.config.post_steps, 1, 2)
    assert passes == {"tap", "tap-no-kd"}
    assert set(asked) == {("personal", True, patience), ("personal", False, patience)}


def plain_tap(experiment):
    """The experiment's method without patience."""
    from tap_jax import assembly

    config = experiment.config.copy_and_resolve_references()
    config.distillation.patience = 0
    return assembly.method_of(assembly.cut(config), experiment.model)


class Silent:
    """A cohort that holds nothing out."""

    def held_out_loss(self, params):
        return np.zeros((1, 2))

    def similarity(self, params, other):
        return np.zeros((1, 2))


@pytest.mark.parametrize("criterion", [criteria.held_out, criteria.representation])
def test_without_held_out_samples_the_losses_of_the_round_decide(criterion):
    h_l, h_p = np.array([[0.5, 0.5]]), np.array([[0.6, 0.505]])
    e = criteria.Evidence(Silent(), {}, {}, h_l, h_p, np.full(2, 0.01), np.ones((1, 2), bool), ())
    assert np.asarray(criterion(e)).tolist() == np.asarray(criteria.loss(e)).tolist() == [[True, False]]


def test_a_criterion_needs_tap_and_a_method_its_variants(tiny):
    with pytest.raises(UserError, match="criterion: replacement is TAP's"):
        tap_jax.build(tiny(({"ag_news": 1.0},), {"cohort_size": 1, "method": "fedavg"}), criterion=criteria.loss)
    with pytest.raises(UserError, match="variants: missing; name what the method's finish yields"):
        tap_jax.build(tiny(({"ag_news": 1.0},), {"cohort_size": 1}), method=fedavg())
