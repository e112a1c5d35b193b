"""Theorem 1 and its mended form: hand-computed values, properties, counterexamples, and both against measurement."""

import doctest
import importlib
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tap_jax
from tap_jax.errors import UserError
from tap_jax.theory import bound, check, largest_rate, mended_bound, report
from tap_jax.theory.__main__ import main
from tap_jax.theory.bound import MENDED_OVER_PRINTED, terms
from tap_jax.theory.check import EQUATION_1, OF_PROOF, Setting, measure
from tap_jax.theory.quadratics import Quadratics, draw, fedavg

BY_HAND = {"smoothness": 2.0, "local_steps": 3, "heterogeneity": [1.0, 2.0], "owners": [2, 4]}

positive = st.floats(0.1, 10)
vectors = st.lists(st.tuples(positive, positive, st.integers(1, 20)), min_size=1, max_size=5)


def one_block(targets, *, curvature=1.0, noise=0.0, data=None) -> Quadratics:
    """Owners of one scalar block: g_k = curvature (w - target_k)²/2."""
    targets = np.array(targets, float)[:, None]
    data = np.ones(len(targets)) if data is None else np.array(data, float)
    hessians = np.full((len(targets), 1, 1), curvature)
    return Quadratics(np.zeros(targets.shape, int), hessians, curvature * targets, noise, data / data.sum())


def test_values_by_hand():
    # Σ η = 0.3, Σ η² = 0.05, Σ η³ = 0.009; Z = 3, C_K = 3/4, R + 1 = 2.
    found = terms([0.1, 0.2], 5.0, noise=0.5, **BY_HAND)
    assert found == pytest.approx((8 * 5 / 0.3, 172.8, 432, 6))
    assert bound([0.1, 0.2], 5.0, noise=0.5, **BY_HAND) == pytest.approx(744.13333333)
    # Z = 1 + 1, V = 0.5 + 0.125, N = 0.25 + 0.03125.
    mended = mended_bound([0.1, 0.2], 5.0, noise=[0.5, 0.25], shares=[1, 0.5], **BY_HAND)
    assert mended == pytest.approx((5 + 6 * 0.28125 * 0.05 + 108 * (2 + 0.625 / 3) * 0.009) * 8 / 2.7)
    assert largest_rate(2.0, 3) == pytest.approx(1 / 288)


def test_the_example_of_the_docstring_and_the_public_name():
    module = importlib.import_module("tap_jax.theory.bound")
    assert tap_jax.bound is bound is module.bound
    assert doctest.testmod(module) == (0, 3)


@settings(max_examples=50, deadline=None)
@given(blocks=vectors, smoothness=positive, steps=st.integers(1, 20), rates=st.lists(positive, min_size=1, max_size=4))
def test_both_bounds_grow_with_every_constant(blocks, smoothness, steps, rates):
    zeta, sigma, owners = (list(column) for column in zip(*blocks, strict=True))

    def both(smoothness=smoothness, steps=steps, zeta=zeta, sigma=sigma, owners=owners, decrease=1.0):
        known = {"smoothness": smoothness, "local_steps": steps, "heterogeneity": zeta, "owners": owners}
        mended = mended_bound(rates, decrease, noise=sigma, shares=[1.0] * len(owners), **known)
        return np.array([bound(rates, decrease, noise=sum(sigma), **known), mended])

    before = both()
    assert np.all(both(smoothness=2 * smoothness) > before)
    assert np.all(both(zeta=[*zeta[:-1], 2 * zeta[-1]]) > before)
    assert np.all(both(sigma=[*sigma[:-1], 2 * sigma[-1]]) > before)
    assert np.all(both(owners=[*owners[:-1], owners[-1] + 1]) < before)
    assert np.all(both(decrease=2.0) > before)
    assert np.all(both(zeta=[*zeta, 0.1], sigma=[*sigma, 0.1], owners=[*owners, 3]) > before)  # one block more
    # In τ the printed bound grows; the mended one has a factor 1/τ before the way to go, as more steps go further.
    assert both(steps=steps + 1)[0] > before[0]
    assert both(steps=steps + 1, decrease=0.0)[1] > both(decrease=0.0)[1]
    assert before[1] < before[0]


def test_cutting_a_block_in_two_raises_only_the_printed_bound():
    # Nothing that is computed changes when 4 parameters become 2 + 2; ζ² and the noise of the block are shared out.
    rates, known = [0.01] * 10, {"smoothness": 1.0, "local_steps": 4}
    whole = {"heterogeneity": [3.0], "owners": [5]}
    cut = {"heterogeneity": [1.0, 2.0], "owners": [5, 5]}
    assert bound(rates, 1.0, noise=2.0, **known, **cut) > bound(rates, 1.0, noise=2.0, **known, **whole)
    one = mended_bound(rates, 1.0, noise=[2.0], shares=[1], **known, **whole)
    two = mended_bound(rates, 1.0, noise=[0.5, 1.5], shares=[1, 1], **known, **cut)
    assert one == pytest.approx(two, rel=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rates": []}, r"rates must be a list of numbers, not \[\]"),
        ({"rates": [0.1, 0.0]}, "rates must be positive, not 0.0"),
        ({"smoothness": 0.0}, "smoothness must be positive, not 0.0"),
        ({"local_steps": 0}, "local_steps must be at least 1, not 0"),
        ({"noise": -1.0}, "noise must be at least 0, not -1.0"),
        ({"heterogeneity": [1.0]}, r"heterogeneity and owners must .*, not \(1, 2\)"),
        ({"owners": [1, 0]}, "owners must be at least 1 for every block, not 0.0"),
    ],
)
def test_arguments_out_of_range_are_named(change, message):
    fine = {"rates": [0.1], "decrease": 1.0, "noise": 1.0, **BY_HAND}
    with pytest.raises(UserError, match=f"^{message}$"):
        bound(**{**fine, **change})


def test_fedavg_on_one_block_follows_the_closed_form():
    # Owners share the curvature a, so W_t - w* shrinks by ρ = (1 - ηa)^τ a round and the noise adds a known variance.
    curvature, rate, steps, noise, start = 0.7, 0.3, 4, 0.5, 2.0
    federation = one_block([-1.0, 0.0, 4.0], curvature=curvature, noise=noise)
    weights = federation.per_block()
    best = federation.stationary(weights)
    assert best == pytest.approx(1.0)
    rates = np.full(6, rate)
    path = fedavg(federation, np.full((1, 1), start), rates, local_steps=steps, weights=weights, seeds=20_000, seed=3)
    shrink = (1 - rate * curvature) ** steps
    added = rate**2 * noise / 3 * sum((1 - rate * curvature) ** (2 * s) for s in range(steps))
    expected, variance = [], 0.0
    for t in range(7):
        expected.append(curvature**2 * ((shrink**t * (start - 1)) ** 2 + variance))
        variance = shrink**2 * variance + added
    measured = np.square(federation.gradient(weights, path)).sum((-2, -1)).mean(1)
    np.testing.assert_allclose(measured, expected, rtol=0.05)
    assert federation.value(weights, path[0])[0] == pytest.approx(
        np.mean([curvature * (start**2 / 2 - start * target) for target in (-1, 0, 4)])
    )


@pytest.mark.parametrize("coupled", [False, True])
def test_value_and_gradient_agree(coupled):
    federation = draw(3, 2, seed=5, coupled=coupled)
    assert federation.separable != coupled
    point = np.random.default_rng(0).standard_normal(federation.shape)
    weights = [federation.per_client()] if coupled else [federation.per_client(), federation.per_block()]
    for u in weights:
        found = federation.gradient(u, point)
        for at in np.ndindex(point.shape):
            step = np.zeros_like(point)
            step[at] = 1e-3
            slope = (federation.value(u, point + step) - federation.value(u, point - step)) / 2e-3
            assert slope == pytest.approx(found[at], abs=1e-8)
        np.testing.assert_allclose(federation.gradient(u, federation.stationary(u)), 0, atol=1e-9)


def test_coupled_losses_have_no_objective_of_the_proof():
    # Client 0 owns x and y and has g = xy, client 1 owns x and has g = 0 (its y is a block nobody shares).
    hessians = np.array([[[0.0, 1.0], [1.0, 0.0]], np.zeros((2, 2))])
    federation = Quadratics(np.array([[0, 1], [0, 2]]), hessians, np.zeros((2, 2)), 0.0, np.array([0.5, 0.5]))

    def jacobian(weights):
        columns = federation.gradient(weights, np.eye(3)[:, :, None])[..., 0]
        return columns.T

    assert jacobian(federation.per_block())[0, 1] == 0.5
    assert jacobian(federation.per_block())[1, 0] == 1.0  # not symmetric: the owners' means are no gradient
    np.testing.assert_array_equal(jacobian(federation.per_client()), jacobian(federation.per_client()).T)


def test_plain_means_of_unequal_clients_contradict_the_theorem():
    # The counterexample of the module text, 3: |D_1| = 3|D_2|, start between the two targets, no noise.
    federation = one_block([1.0, -1.0], data=[3, 1])
    rate = 0.001 * largest_rate(1.0, 1)
    run = {"local_steps": 1, "seeds": 1, "seed": 0}
    path = fedavg(federation, np.zeros((1, 1)), np.full(50, rate), weights=federation.per_block(), **run)
    assert not path.any()
    gradient = federation.gradient(federation.per_client(), path)
    np.testing.assert_allclose(np.square(gradient), 0.25)
    away = float(np.mean(np.square(federation.gradients(federation.take(path[0, 0])) - gradient[0, 0])))
    right = bound([rate] * 50, 0.0, smoothness=1.0, local_steps=1, noise=0.0, heterogeneity=[away], owners=[2])
    assert right < 0.01


def test_every_small_setting_holds_or_says_why_not():
    verdicts = [
        verdict
        for setting in check.grid(pairs=(1, 3), owners=(2,), local_steps=(1, 5))
        for verdict in measure(setting, seeds=3)
    ]
    assert not any(verdict.unexplained for verdict in verdicts)
    kept = [v for v in verdicts if not v.printed_broken]
    assert len(kept) > 40 and all(v.printed_holds and v.mended_holds for v in kept)
    assert all(v.measured <= v.weighted * (1 + 1e-9) for v in verdicts)
    failing = [v for v in verdicts if not v.printed_holds]
    reasons = {reason.split()[0] for v in failing for reason in v.printed_broken}
    assert reasons == {"rate", "2", "the"}  # too large a rate, 2 of 30 clients, a mean that is not the objective's
    between = [v for v in verdicts if v.setting.rate == MENDED_OVER_PRINTED]
    assert between and all(v.printed_broken and not v.mended_broken and v.mended_holds for v in between)


def test_heterogeneity_is_exact_where_blocks_are_separable():
    # ζ_r² about the owners' mean is the same at every W there, so that one iterate knows it as well as a hundred.
    one, many = (measure(Setting(3, 4, 2, rounds=rounds))[0] for rounds in (1, 100))
    assert one.objective == OF_PROOF
    assert one.printed.heterogeneity == pytest.approx(many.printed.heterogeneity, rel=1e-9)


def test_growth_is_that_of_a_sum_over_blocks():
    grown = check.growth(pairs=(2, 16), draws=4)

    def ratio(value, objective):
        small, large = (
            np.mean([value(v) for v in grown if v.objective == objective and v.setting.pairs == pairs])
            for pairs in (2, 16)
        )
        return large / small

    for objective in (OF_PROOF, EQUATION_1):
        assert ratio(lambda v: sum(v.printed[1:]), objective) > 3
    assert ratio(lambda v: v.measured, OF_PROOF) > 3
    assert ratio(lambda v: v.mended, OF_PROOF) > 3
    assert ratio(lambda v: v.measured, EQUATION_1) < 1
    assert ratio(lambda v: v.mended, EQUATION_1) < 1.5


def test_a_run_is_a_function_of_its_seed():
    setting = Setting(3, 2, 5, coupled=True, cohort=2)
    assert measure(setting, seeds=2) == measure(setting, seeds=2)
    assert measure(setting, seeds=2) != measure(setting, seeds=2, seed=1)


def test_the_files_tell_every_failure(tmp_path, monkeypatch, capsys):
    settings_ = [Setting(2, 2, 1), Setting(2, 2, 1, rate=200.0, rounds=20)]
    monkeypatch.setattr(check, "grid", lambda: settings_)
    grown = check.growth(pairs=(1, 2), draws=1)
    monkeypatch.setattr(check, "growth", lambda: grown)
    monkeypatch.setattr("sys.argv", ["theory", f"--out={tmp_path}"])
    assert main() == 0
    text = (tmp_path / "theory_bound.md").read_text()
    assert text in capsys.readouterr().out
    assert "rate 200 times the largest" in text and "UNEXPLAINED" not in text
    assert len((tmp_path / "theory_bound.csv").read_text().splitlines()) == 1 + 4 + 4
    assert (tmp_path / "theory_bound.png").read_bytes().startswith(b"\x89PNG")

    kept = measure(settings_[0])[0]
    unexplained = type(kept)(**{**vars(kept), "measured": math.inf})
    assert "UNEXPLAINED" in report.summary([kept, unexplained])
    monkeypatch.setattr(check, "measure", lambda setting, *, seed: [unexplained])
    assert main() == 1
