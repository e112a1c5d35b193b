"""The private aggregate against loops over clients and blocks, its noise against its definition, ε against the library.

The claim behind ε, that one client can change the sums by no more than 2C, is tested as a property.
"""

import json
import sys
import types

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dp_accounting import rdp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from tap_jax import blocks
from tap_jax import experiment as experiments
from tap_jax.engine import exchange, packed
from tap_jax.engine import privacy as mechanism
from tap_jax.engine.checkpointing import Checkpoints
from tap_jax.engine.local_training import Losses
from tap_jax.engine.privacy import Privacy
from tap_jax.engine.rounds import resume
from tap_jax.engine.screening import Screening, update_norms
from tap_jax.errors import UserError
from tests.engine.test_packed import LIKE, NAMES, TASKS, draw, masks, partition, seeds
from tests.engine.test_screening import hostile
from tests.trajectories import run_by

FEDERATION = 7  # K
cohorts = st.integers(1, FEDERATION)  # m
federations = st.lists(
    st.lists(st.booleans(), min_size=TASKS, max_size=TASKS), min_size=FEDERATION, max_size=FEDERATION
)
bounds = st.sampled_from([0.01, 1.0, 10.0, np.inf])


def flat(block) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(block)]).astype(np.float64)


def world(touches, tasks, seed, size):
    """A federation with private blocks, and a cohort of `size` whose blocks have moved, each by its own scale."""
    rng = np.random.default_rng(seed)
    p = partition(touches, tasks).with_private(NAMES[1:3])
    like = LIKE | {blocks.PRIVATE + name: LIKE[name] for name in NAMES[1:3]}
    server = draw(rng) | {blocks.PRIVATE + name: draw(rng)[name] for name in NAMES[1:3]}
    clients = np.sort(rng.choice(FEDERATION, size, replace=False))
    sent = [moved(rng, server, p.blocks_of(k)) for k in clients]
    return types.SimpleNamespace(rng=rng, p=p, like=like, server=server, clients=clients, sent=sent)


def moved(rng, server, names):
    scale = rng.choice([0.0, 1e-3, 1.0, 1e3, 1e30])
    return {
        n: jax.tree.map(lambda x: (x + scale * rng.normal(size=x.shape)).astype(np.float32), server[n]) for n in names
    }


def laid_out(w, sent=None):
    """What `private_aggregate` takes of a world: server, cohort, their layout, and what is sent bool [P, R]."""
    owned = w.p.owned[w.clients]
    layout, server_layout = packed.lay_out(w.p, owned), packed.server_layout(w.p)
    server = packed.pack(w.p, server_layout, [w.server], w.like)
    cohort = packed.pack(w.p, layout, w.sent if sent is None else sent, w.like)
    return *jax.tree.map(jnp.asarray, (server, cohort)), server_layout, layout, owned & w.p.sent


def average(w, privacy, *, sent=None, key=0):
    """`private_aggregate` of all finite updates, packed."""
    server, cohort, server_layout, layout, counts = laid_out(w, sent)
    finite = [
        all(np.isfinite(flat(tree)).all() for tree in mine.values()) for mine in (w.sent if sent is None else sent)
    ]
    return mechanism.private_aggregate(
        server,
        cohort,
        server_layout,
        layout,
        counts & np.array(finite)[:, None],
        update_norms(server, cohort, server_layout, layout, counts),
        expected=mechanism.expected_owners(w.p.owned, w.p.sent, len(w.clients)),
        privacy=privacy,
        key=jax.random.key(key) if isinstance(key, int) else key,
    )


def by_name(w, params):
    return packed.unpack(w.p, packed.server_layout(w.p), params, w.like)[0]


def clipped_sum(w, bound, sent=None):
    """Block -> Σ of clipped updates, float64, one client and block at a time."""
    total = {name: np.zeros_like(flat(tree)) for name, tree in w.server.items() if not name.startswith(blocks.PRIVATE)}
    for mine in w.sent if sent is None else sent:
        update = {name: flat(mine[name]) - flat(w.server[name]) for name in mine if name in total}
        length = np.sqrt(sum((move**2).sum() for move in update.values()))
        if not np.isfinite(length) or length > 1e19:  # whose square float32 cannot hold
            continue
        for name, move in update.items():
            total[name] += move * min(1.0, bound / length if length else 1.0)
    return total


def denominator(w, name) -> float:
    owners = sum(name in w.p.blocks_of(k) for k in range(FEDERATION))
    return max(1.0, len(w.clients) * owners / FEDERATION) if owners else 0.0


@settings(max_examples=20, deadline=None)
@given(masks, federations, cohorts, bounds, seeds)
def test_without_noise_it_is_the_clipped_sum_over_a_fixed_number(touches, tasks, size, bound, seed):
    w = world(touches, tasks, seed, size)
    after, expected = by_name(w, average(w, Privacy(0.0, bound, 1e-5))), clipped_sum(w, bound)
    for name, tree in w.server.items():
        if name not in expected or not denominator(w, name):
            jax.tree.map(np.testing.assert_array_equal, after[name], tree)
            continue
        move = expected[name] / denominator(w, name)
        np.testing.assert_allclose(
            flat(after[name]), flat(tree) + move, rtol=1e-5, atol=1e-5 * max(1.0, np.abs(move).max())
        )
        # However far clients went, a block goes no further than its owners' clipped updates can carry it.
        if bound < np.inf:
            there = sum(name in mine for mine in w.sent)
            went = np.linalg.norm(flat(after[name]) - flat(tree))
            assert went <= there * bound / denominator(w, name) * 1.0001 + 1e-5


@settings(max_examples=15, deadline=None)
@given(masks, federations, cohorts, seeds, st.sampled_from(["other data", "nan", "inf", "huge", "nothing"]))
def test_one_client_changes_the_sums_by_at_most_twice_the_bound(touches, tasks, size, seed, how):
    w, bound = world(touches, tasks, seed, size), 0.5
    other = list(w.sent)
    k = w.rng.integers(size)
    names = w.p.blocks_of(w.clients[k])
    other[k] = {
        "other data": lambda: moved(w.rng, w.server, names),
        "nothing": lambda: {name: w.server[name] for name in names},
        "huge": lambda: {
            name: jax.tree.map(lambda x: -np.sign(x) * np.float32(3e38), w.server[name]) for name in names
        },
        "inf": lambda: {name: jax.tree.map(lambda x: x * np.float32(np.inf), w.server[name]) for name in names},
        "nan": lambda: {name: jax.tree.map(lambda x: x * np.float32(np.nan), w.server[name]) for name in names},
    }[how]()
    one, two = (by_name(w, average(w, Privacy(0.0, bound, 1e-5), sent=sent)) for sent in (w.sent, other))
    difference = np.concatenate([(flat(one[n]) - flat(two[n])) * denominator(w, n) for n in one])
    assert np.linalg.norm(difference) <= 2 * bound * 1.0001 + 1e-4


def test_of_everybody_without_bound_and_noise_it_is_the_uniform_mean():
    w = world(np.eye(TASKS, len(NAMES), dtype=bool) | (np.arange(len(NAMES)) == 4), [[1, 0, 1]] * FEDERATION, 0, 7)
    for mine in w.sent:  # of one size, so that neither swallows the other in float32
        mine.update({name: jax.tree.map(lambda x: x + np.float32(0.1), w.server[name]) for name in mine})
    w.sent[2] = {name: jax.tree.map(lambda x: x - np.float32(0.4), w.server[name]) for name in w.sent[2]}
    server, cohort, server_layout, layout, sent = laid_out(w)
    plain = by_name(w, packed.aggregate(server, cohort, server_layout, layout, sent.astype(np.float32)))
    for name, tree in by_name(w, average(w, Privacy(0.0, np.inf, 1e-5))).items():
        np.testing.assert_allclose(flat(tree), flat(plain[name]), rtol=1e-5, atol=1e-6)


def test_noise_has_its_deviation_on_every_block_that_anybody_owns():
    """Whoever was drawn: here block 3 has an owner, but none in the cohort, and block 5 has none at all."""
    touches = [[1, 1, 0, 0, 1, 0], [0, 1, 1, 0, 1, 0], [0, 0, 0, 1, 1, 0]]
    tasks = [[1, 1, 0]] * 6 + [[0, 0, 1]]
    w = next(w for w in (world(touches, tasks, seed, 2) for seed in range(99)) if 6 not in w.clients)
    z, bound, draws = 1.5, 0.4, 3000
    expected, noise = clipped_sum(w, bound), {name: [] for name in w.server}
    run = jax.jit(jax.vmap(lambda key: average(w, Privacy(z, bound, 1e-5), key=key)))
    drawn = jax.device_get(run(jax.random.split(jax.random.key(1), draws)))
    for n in range(draws):
        for name, tree in by_name(w, {group: leaf[n] for group, leaf in drawn.items()}).items():
            if name in expected and denominator(w, name):
                sums = (flat(tree) - flat(w.server[name])) * denominator(w, name)
                noise[name].append(sums - expected[name])
            else:
                jax.tree.map(np.testing.assert_array_equal, tree, w.server[name])
    assert {name for name, found in noise.items() if found} == set(NAMES[:5])
    found = np.concatenate([np.array(noise[name]) for name in NAMES[:5]], axis=1) / (z * bound)
    deviations = np.sqrt(found.shape[0])
    assert np.abs(found.mean(0)).max() * deviations < 4.5
    np.testing.assert_allclose(found.std(0), 1, atol=4.5 / np.sqrt(2) / deviations)
    between = np.corrcoef(found.T) - np.eye(found.shape[1])  # no number has another's noise
    assert np.abs(between).max() * deviations < 5
    assert stats.kstest(found[:, ::3].ravel(), "norm").pvalue > 1e-3


def library(z, clients, cohort, rounds, delta) -> float:
    event = dp_accounting.SampledWithoutReplacementDpEvent(clients, cohort, dp_accounting.GaussianDpEvent(z / 2))
    accountant = rdp.RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE)
    return accountant.compose(event, rounds).get_epsilon(delta)


def spent(z, clients, cohort, rounds, delta=1e-5) -> float:
    return mechanism.epsilon(Privacy(z, 3.0, delta), clients=clients, cohort=cohort, rounds=rounds)


@pytest.mark.parametrize(("z", "clients", "cohort", "rounds"), [(1, 30, 2, 200), (4, 30, 6, 28), (1, 3000, 30, 200)])
def test_epsilon_is_the_librarys(z, clients, cohort, rounds):
    assert spent(z, clients, cohort, rounds) == pytest.approx(library(z, clients, cohort, rounds, 1e-5), rel=1e-9)
    curve = [spent(z, clients, cohort, t) for t in (0, 1, rounds // 2, rounds)]
    assert curve[0] == 0 and curve == sorted(curve) and len(set(curve)) == 4
    assert spent(2 * z, clients, cohort, rounds) < curve[-1]
    assert spent(z, clients, cohort, rounds, 1e-3) < curve[-1]


def exact_gaussian(deviation, delta) -> float:
    """ε of a Gaussian mechanism of sensitivity 1 (Balle & Wang, 2018, theorem 8)."""

    def excess(eps):
        low, high = 1 / (2 * deviation) - eps * deviation, -1 / (2 * deviation) - eps * deviation
        return stats.norm.cdf(low) - np.exp(eps) * stats.norm.cdf(high) - delta

    return optimize.brentq(excess, 0, 200)


@pytest.mark.parametrize(("z", "rounds"), [(4.0, 1), (8.0, 20), (2.0, 5)])
def test_where_everybody_takes_part_epsilon_is_just_above_the_exact_one(z, rounds):
    """Which has nothing to do with Rényi divergences: Gaussians compose to one of noise z / 2 / √T per sensitivity."""
    exact = exact_gaussian(z / 2 / np.sqrt(rounds), 1e-5)
    assert exact <= spent(z, 30, 30, rounds) <= 1.25 * exact
    assert all(spent(z, 30, m, rounds) <= spent(z, 30, 30, rounds) for m in (1, 6, 15, 25, 29))


def test_without_the_accountant_one_line_says_what_to_install(monkeypatch, tiny):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    mechanism._one_round.cache_clear()
    with pytest.raises(UserError, match=r"privacy.noise_multiplier: .* pip install 'tap-jax\[privacy\]'"):
        experiments.build(tiny(ROWS, PRIVATE))


ROWS = ({"ag_news": 0.3}, {"ag_news": 0.3}, {"ag_news": 0.3, "cifar100": 0.5})
PRIVATE = {"method": "fedavg", "aggregation": "uniform", "privacy.noise_multiplier": 0.8, "privacy.clip_norm": 0.05}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"aggregation": "samples"}, "^aggregation: .*'uniform'"),
        ({"method": "local"}, "^privacy.noise_multiplier: method 'local'"),
        ({"method": "centralised"}, "^privacy.noise_multiplier: method 'centralised'"),
        ({"privacy.delta": 1.0}, "^privacy.delta"),
        ({"privacy.clip_norm": 0.0}, "^privacy.clip_norm"),
        ({"privacy.noise_multiplier": -1.0}, "^privacy.noise_multiplier"),
    ],
)
def test_what_would_not_be_private_is_refused(tiny, fields, message):
    with pytest.raises(UserError, match=message):
        tiny(ROWS, PRIVATE | fields)


def test_a_private_run_reports_epsilon_and_resumes_to_the_same_bits(tiny, tmp_path):
    experiment = experiments.build(tiny(ROWS, PRIVATE))

    def interrupt(line):
        if line["round"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_by(experiment, tmp_path, progress=interrupt)
    said = run_by(experiment, tmp_path)
    assert any(text.startswith("resuming after round 1") for text in said)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["epsilon"] for line in lines] == [spent(0.8, 3, 2, t) for t in (1, 2, 3)]
    assert all(set(line["update_norms"]) == set(map(str, line["clients"])) for line in lines)
    found = json.loads((tmp_path / "results.json").read_text())["privacy"]
    assert found["epsilon"] == lines[-1]["epsilon"] and found["delta"] == 1e-5 and found["rounds"] == 3
    assert "Privacy: ε = " in (tmp_path / "report.md").read_text()
    notes = [text for text in said if text.startswith("privacy: ")]
    assert f"{found['epsilon']:.4g}" in notes[0] and "data.tokenizer" in notes[1]

    states = [experiment.init()]
    for _ in range(experiment.config.rounds):
        states.append(experiment.round(states[-1])[0])
    servers = [experiment.engine.server_blocks(state.server) for state in states]
    resumed = resume(Checkpoints(tmp_path / "checkpoints"), states[0])
    jax.tree.map(np.testing.assert_array_equal, experiment.engine.server_blocks(resumed.server), servers[-1])
    # Every round draws its own noise, on every block: cifar100's owner is not in every cohort.
    assert any(2 not in line["clients"] for line in lines)
    for before, after in zip(servers, servers[1:], strict=False):
        assert all((flat(before[name]) != flat(after[name])).mean() > 0.99 for name in before)


@pytest.mark.parametrize("method", ["tap", "feddat"])
def test_what_a_method_sends_is_clipped_and_what_it_keeps_stays(tiny, monkeypatch, method):
    """With next to no noise the server moves by the clipped updates; FedDAT's own adapters are left out."""
    fields = PRIVATE | {"method": method, "privacy.noise_multiplier": 1e-6, "feddat.bottleneck": 2}
    experiment = experiments.build(tiny(ROWS, fields))
    state, sent = experiment.init(), hostile(monkeypatch, lambda x: x * np.nan, client=0)
    after, line = experiment.round(state)
    (found,) = sent
    w = types.SimpleNamespace(
        p=experiment.partition, server=found.before, sent=list(found.clients.values()), clients=list(found.clients)
    )
    expected = clipped_sum(w, 0.05)
    assert [entry["client"] for entry in line["dropped"]] == [k for k in found.clients if k == 0]
    assert all(norm is None or norm > 0.05 for norm in line["update_norms"].values()), "nothing to clip"
    assert [key for key in line if f'"{key}"' not in experiments.Experiment.round.__doc__] == [], "not explained"
    server = experiment.engine.server_blocks(after.server)
    for name, before in found.before.items():
        if name not in expected:
            jax.tree.map(np.testing.assert_array_equal, server[name], before)
            continue
        owners = sum(name in experiment.partition.blocks_of(k) for k in range(len(ROWS)))
        move = expected[name] / max(1.0, 2 * owners / len(ROWS))
        np.testing.assert_allclose(flat(server[name]), flat(before) + move, atol=2e-6)


def test_switched_off_it_is_the_plain_aggregate_to_the_bit():
    w = world(np.ones((TASKS, len(NAMES)), bool), [[1, 1, 1]] * FEDERATION, 3, 4)
    server, cohort, server_layout, layout, sent = laid_out(w)
    weights = np.where(sent, np.array([[3.0], [5.0], [1.0], [7.0]]), 0).astype(np.float32)
    ones = np.ones((4, TASKS), np.float32)
    losses, shard = Losses(ones, ones, ones.astype(np.int32)), {group: leaf[None] for group, leaf in cohort.items()}
    switched_off = jax.jit(lambda *args: exchange.aggregate(Screening(), None, None, server_layout, *args, None)[0])
    plain = jax.jit(lambda *args: packed.aggregate(*args[:2], server_layout, *args[2:]))
    jax.tree.map(
        np.testing.assert_array_equal,
        switched_off(server, shard, layout, weights, losses),
        plain(server, cohort, layout, weights),
    )
