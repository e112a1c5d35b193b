"""DisentAFL: its auxiliary loss, literally over pairs of samples, and whole runs with it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tap_jax import experiment as experiments
from tap_jax.engine.cohort import Cohort
from tap_jax.methods import disentafl
from tap_jax.methods.base import Row
from tap_jax.tasks import find_task
from tests.methods.oracles import DisentAFL, FedAvg
from tests.trajectories import agree, alive, check_federated, play

ROWS = (
    {"ag_news": 0.3},  # one group
    {"ag_news": 0.3, "mmlu": 0.3},  # two
    {"vqa": 0.4},  # two modalities of one task are two groups
    {"vqa": 0.3, "mmlu": 0.3, "common_gen": 0.5, "ag_news": 0.3},  # three: text of three tasks is one of them
)
SETTINGS = {
    "method": "disentafl",
    "variants": ("disentafl", "disentafl+post", "disentafl+2p"),
    "cohort_size": 3,
    "rounds": 2,
    "post_steps": 2,
    "batch_size": 6,
    "engine.microbatch": 4,
    "mesh.clients": 2,
    "disentafl.weight": 2.0,
    "optimizer.learning_rate_initial": 5e-5,
    "optimizer.learning_rate": 1e-4,
    "optimizer.post_learning_rate": 3e-5,
}
TASKS = tuple(map(find_task, ("ag_news", "vqa", "mmlu")))


@pytest.fixture(scope="module")
def experiment(tiny):
    return alive(experiments.build(tiny(ROWS, SETTINGS)))


@pytest.fixture(scope="module")
def run(experiment):
    return play(experiment)


def test_run_equals_oracle(experiment, run):
    """Rounds, post-training, and post-training twice."""
    check_federated(experiment, run, DisentAFL(experiment))


@pytest.mark.parametrize("fault", ["tasks", "sum", "none"])
def test_the_comparison_notices(experiment, run, fault):
    """Groups by task instead of kind, the sum over pairs instead of their mean, no auxiliary loss at all."""
    wrong = DisentAFL(experiment, "" if fault == "none" else fault)
    if fault == "none":
        wrong.auxiliary = lambda latents: 0.0
    with pytest.raises(AssertionError):
        check_federated(experiment, run, wrong)


def test_clients_with_one_group_train_as_in_fedavg(experiment, run, tiny):
    """Client 0's rows are worth no collecting; others' latents do not touch it."""
    assert experiment.engine.with_statistics == {1, 2, 3}
    trained = []
    for clients in ([0, 1, 3], [0]):
        cohort = Cohort.of(experiment.engine, clients, 0)
        state = experiment.init()
        _, params, _ = cohort.train(state, cohort.broadcast(state.server), "federated")
        trained.append(cohort.unload(params)[0])
    jax.tree.map(np.testing.assert_array_equal, *trained)
    plain = FedAvg(experiment)
    expected, *_ = plain.train(plain.received(0), 0, 0, "federated")
    assert agree(trained[0], expected, experiment.initial_blocks)


def test_a_broken_client_stays_alone(tiny):
    """Rows of padding run with somebody's blocks: what comes of them belongs to nobody's sums."""
    rows = ({"ag_news": 0.5, "mmlu": 0.5}, {"cifar100": 0.08, "ag_news": 0.08})  # client 0 has no image encoder
    experiment = alive(experiments.build(tiny(rows, SETTINGS | {"cohort_size": 2, "mesh.clients": 1})))
    healthy, found = experiment.initial_blocks, []
    owned = [{b: healthy[b] for b in experiment.partition.blocks_of(i)} for i in range(2)]
    sick = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), owned[1])
    for second in (owned[1], sick):
        cohort = Cohort.of(experiment.engine, [0, 1], 0)
        _, params, losses = cohort.train(experiment.init(), cohort.load([owned[0], second]), "federated")
        assert cohort.clients[0] == 0, "padding names position 0"
        found.append((cohort.unload(params)[0], np.asarray(losses.plain)[0]))
    jax.tree.map(np.testing.assert_array_equal, *found)


# --- The loss by itself ----------------------------------------------------------------------------------------------


def minibatch(latents: dict) -> list[tuple[Row, jax.Array]]:
    """Rows of at most three samples, the last one padded; `latents`: task name -> [modalities, B, D]."""
    rows = []
    for task in TASKS:
        z = jnp.asarray(latents.get(task.name, np.zeros((len(task.modalities), 0, 1))), jnp.float32)
        for start in range(0, z.shape[1], 3):
            mine = z[:, start : start + 3]
            real = mine.shape[1]
            weights = jnp.where(jnp.arange(3) < real, 1 / z.shape[1], 0)
            padding = jnp.ones((len(mine), 3 - real, z.shape[2]))
            row = Row(None, task, {}, weights, jnp.int32(0), None, None)
            rows.append((row, jnp.concatenate([mine, padding], axis=1)))
    return rows


def two_passes(rows) -> jax.Array:
    """Σ over rows of `disentanglement`, given what a first pass over all rows collects."""
    width = rows[0][1].shape[-1]
    nothing = jnp.zeros((1, width, width)), jnp.zeros(1)
    sums = {group: nothing for task in TASKS for group in disentafl.groups_of(task)}
    for row, z in rows:
        for group, found in disentafl.second_moments(row, z).items():
            sums[group] = jax.tree.map(lambda total, x: total + x[None], sums[group], found)
    others = jax.lax.stop_gradient(disentafl.counterparts(sums))
    return sum(disentafl.disentanglement(row, z, others) for row, z in rows)


def literal(latents: dict):
    """The mean over pairs of groups of the mean over pairs of samples of cos²."""
    groups: dict = {}
    for task in TASKS:
        for modality, z in zip(task.modalities, latents.get(task.name, ()), strict=False):
            groups.setdefault((modality, task.kind), []).extend(z)
    terms = []
    for first, second in itertools.combinations(groups.values(), 2):
        squares = [((a @ b) / jnp.sqrt((a @ a) * (b @ b))) ** 2 for a in first for b in second]
        terms.append(sum(squares) / len(squares))
    return sum(terms) / max(len(terms), 1)


def at(*degrees: float) -> np.ndarray:
    """Directions in the plane, of different lengths, as the latents of one modality: [1, B, 2]."""
    angles = np.deg2rad(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], -1)[None] * np.arange(1, len(degrees) + 1)[None, :, None]


@pytest.mark.parametrize(
    ("latents", "expected"),
    [
        ({"ag_news": at(0), "mmlu": at(90)}, 0.0),
        ({"ag_news": at(0), "mmlu": at(180)}, 1.0),
        ({"ag_news": at(0), "mmlu": at(45)}, 0.5),
        ({"ag_news": at(0), "mmlu": at(0, 45, 90, 90)}, (1 + 0.5 + 0 + 0) / 4),
        ({"ag_news": at(0, 90, 45)}, 0.0),  # one group
        ({"vqa": np.concatenate([at(0), at(45)])}, 0.5),  # image and text of one sample
        # vqa's text and mmlu are one group of three; its images another; ag_news the third: pairs of 1/3, 1/2, 1/2.
        ({"vqa": np.concatenate([at(0), at(0)]), "mmlu": at(90, 90), "ag_news": at(45)}, (1 / 3 + 1 / 2 + 1 / 2) / 3),
    ],
)
def test_values_by_hand(latents, expected):
    """The literal loss has them; the value summed over rows is twice that."""
    assert float(literal(latents)) == pytest.approx(expected, abs=1e-6)
    assert float(two_passes(minibatch(latents))) == pytest.approx(2 * expected, abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_two_passes_have_the_gradient_of_the_whole(seed):
    """On random latents, groups of unequal sizes, padded rows: the value twice, the gradient once."""
    rng = np.random.default_rng(seed)
    sizes = {"ag_news": (1, 5), "vqa": (2, 4), "mmlu": (1, 2)}
    latents = {name: rng.standard_normal((*size, 6)).astype(np.float32) for name, size in sizes.items()}
    if seed == 3:
        del latents["vqa"]
    value, gradient = jax.value_and_grad(literal)(latents)
    found, ours = jax.value_and_grad(lambda latents: two_passes(minibatch(latents)))(latents)
    assert float(found) == pytest.approx(2 * float(value), rel=1e-5)
    for name in latents:
        np.testing.assert_allclose(ours[name], gradient[name], rtol=1e-4, atol=1e-6)
