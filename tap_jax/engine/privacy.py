"""DP-FedAvg (McMahan et al., 2018), component-wise: clipped client updates and Gaussian noise on what is averaged.

for the cohort C_t, m of K clients, drawn uniformly without replacement; Δ_i as in `screening`, over all its blocks:
    Δ_i = Δ_i · min(1, C / ‖Δ_i‖);  0 where it is dropped
    for every block B_r that some client of the federation owns, for any draw:
        W̃_r = W̃_r + (Σ_{i in C_t that own r} Δ_{i,r} + N(0, z²C² I)) / max(1, m K_r / K)

Who owns which blocks is public; who was drawn is not, so neither the denominator nor the noise may depend on it: the
former is the number of owners to expect in a cohort, at least 1 so that no client moves a block by more than its own
update, and blocks without an owner in the cohort get their noise as well. Owners are those with a task of the block.
Which domains of it a client has samples of is private: an owner that sends nothing of a block counts as one that did
not move it.

All blocks together are one Gaussian mechanism. Neighbours are federations in which one client's data are any other
data of the same tasks: then the sums differ by at most 2C, so the noise is z/2 of their sensitivity. That is the
relation that sampling without replacement is accounted in, and it covers a client that sends nothing at all.

What (ε, δ) speaks of: the server's blocks of all rounds, and what is made of them alone. Not of personal blocks, loss
histories, optimizer states and scores, which stay with clients in the paper's protocol, nor of who was drawn and how
long updates were, which the server keeps to itself; a simulation writes all of these down. Nor of the frozen weights
and the tokenizer, if those were made of clients' data. What a client trains for itself (X[i], Stage 2, post-training)
is not private towards those who get it.

The noise is float32 and comes from `config.seed`: a deployment needs a secret source of noise and of cohorts, and sums
in which rounding does not tell (Mironov, 2012). A resumed run draws the same noise again, so nothing is spent twice.

Letters: P positions of a cohort, R blocks, K clients of the federation, m in a cohort.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tap_jax.engine.packed import Layout, Packed
from tap_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Privacy:
    """The mechanism.

    Attributes:
      noise_multiplier: z, standard deviation of the noise on the sums in units of `clip_norm`.
      clip_norm: C, largest ‖Δ_i‖.
      delta: δ at which ε is told.
    """

    noise_multiplier: float
    clip_norm: float
    delta: float


def expected_owners(owned: np.ndarray, sent: np.ndarray, cohort: int) -> np.ndarray:
    """m K_r / K of every block, float32 [R]; 0 of those that are never sent.

    Args:
      owned: bool [K, R] of the federation. sent: bool [R]. cohort: m.
    """
    return (cohort * owned.mean(0) * sent).astype(np.float32)


def private_aggregate(
    server: Packed,
    cohort: Packed,
    server_layout: Layout,
    layout: Layout,
    sent: Array,
    norm: Array,
    *,
    expected: np.ndarray,
    privacy: Privacy,
    key: Array,
) -> dict[str, Array]:
    """The server's blocks after one round, see above.

    Args:
      server: W̃ as it was broadcast, params of `server_layout`. cohort: params of `layout`.
      sent: bool [P, R], client k's update of block r counts; what others hold has no influence.
      norm: `screening.update_norms`, float32 [P].
      expected: `expected_owners`.
      key: of (seed, round, "noise").

    Returns:
      Like `server`. A block that is never sent is returned bit by bit.
    """
    deviation = privacy.noise_multiplier * privacy.clip_norm if privacy.noise_multiplier else 0.0
    # Of a norm that overflows it is 0, of one that is no number not above 0.
    factor = jnp.minimum(privacy.clip_norm / norm, 1)
    weights = jnp.pad(jnp.where(sent, factor[:, None], 0), ((0, 1), (0, 0)))
    place = jnp.asarray(server_layout.slot)[0]

    def one(number: int, name: str) -> Array:
        weight, at = weights[layout.owner[name], layout.block[name]][:, None], place[layout.block[name]]
        update = jnp.where(weight > 0, weight * (cohort[name] - server[name][at]), 0)
        total = jnp.zeros_like(server[name]).at[at].add(update)
        noise = deviation * jax.random.normal(jax.random.fold_in(key, number), total.shape, total.dtype)
        owners = jnp.asarray(expected)[server_layout.block[name]][:, None]
        return jnp.where(owners > 0, server[name] + (total + noise) / jnp.maximum(owners, 1), server[name])

    return {name: one(number, name) for number, name in enumerate(sorted(server))}


@functools.lru_cache(maxsize=4)
def _one_round(noise_multiplier: float, clients: int, cohort: int) -> tuple:
    """(orders, bounds): Rényi divergences of one round, by the sampling's bound and by the one without sampling."""
    try:
        import dp_accounting
        from dp_accounting import rdp
    except ImportError:
        raise UserError(
            "privacy.noise_multiplier: the privacy accountant is missing; pip install 'tap-jax[privacy]'"
        ) from None
    gaussian = dp_accounting.GaussianDpEvent(noise_multiplier / 2)  # of the sensitivity 2C
    bounds = []
    for event in (dp_accounting.SampledWithoutReplacementDpEvent(clients, cohort, gaussian), gaussian):
        accountant = rdp.RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE)
        bounds.append(accountant.compose(event).rdp)
    return accountant.orders, bounds


def epsilon(privacy: Privacy, *, clients: int, cohort: int, rounds: int) -> float:
    """ε spent by `rounds` rounds at `privacy.delta`, where one of `clients` clients has other data of the same tasks.

    By Rényi divergences, for sampling `cohort` clients without replacement (Wang et al., 2019); where cohorts are
    nearly all clients, that bound is looser than none for sampling, which then is what counts.

    Raises:
      UserError: the accountant (extra "privacy") is not installed.
    """
    if not rounds:
        return 0.0
    orders, bounds = _one_round(privacy.noise_multiplier, clients, cohort)
    from dp_accounting import rdp

    return float(min(rdp.compute_epsilon(orders, rounds * bound, privacy.delta)[0] for bound in bounds))


def spent(privacy: Privacy, *, clients: int, cohort: int, rounds: int) -> dict:
    """What results say of a run's privacy, JSON-ready."""
    return {
        "epsilon": epsilon(privacy, clients=clients, cohort=cohort, rounds=rounds),
        **dataclasses.asdict(privacy),
        "neighbours": "one client's data replaced",
        "sampling": f"{cohort} of {clients} clients without replacement",
        "rounds": rounds,
        "covers": "the server's blocks of all rounds",
    }
