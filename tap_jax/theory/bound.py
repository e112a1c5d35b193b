r"""The convergence bound of the server model: Theorem 1 (Sec. 4, equation 7) as printed, and as it can be proven.

Symbols. f(W) is the global objective; W has disjoint blocks 0..R; client i owns some of them and its loss g_i depends
on no others; K_r clients own block r; τ local iterations a round; η_t the rate of round t = 0..T-1. Below, P_r cuts
out block r. Losses have any unit u and parameters any unit w; then L is in u/w², rates in w²/u, σ² and ζ_r² in u²/w²,
and so is the bound: it is a bound on a squared gradient.

Assumptions of the theorem: (1) every g_i is L-smooth; it need not be convex; (2) a client's minibatch gradient is
unbiased and E‖noise‖² <= σ²; (3) for every block r, (1/K_r) Σ_{i owns r} ‖P_r∇g_i - P_r∇f‖² <= ζ_r². Every client takes
part in every round, the server takes the plain mean over the K_r owners, and η_t <= `largest_rate` = 1/(48Lτ).
Left unsaid but used: the noise of different clients is independent (13), and f is bounded below (the limit T -> ∞).

**What the derivation (Appendix B.2) does not show.** Checked line by line; equation numbers are the paper's.

1. From (10) to (11) it uses "the fact" P_r∇f = (1/K_r) Σ_{i owns r} P_r∇g_i =: G_r. With the objective of equation 1
   and clients of equal size, P_r∇f = p_r G_r with p_r = K_r/K, so the fact is wrong unless every client owns
   every block. Where a client's loss couples its blocks there is in general no f at all whose gradient is G: client 1
   with g_1 = xy owns blocks x and y, client 2 with g_2 = 0 owns x; then G = (y/2, x), which is no gradient. If every
   g_i is a sum of one function per block, f = Σ_r (1/K_r) Σ_{i owns r} g_{i,r} has that gradient.
2. (11) bounds the change of P_r∇g_i by the drift of block r, and (18) that drift by block r's own gradient. Both
   need the same separability: in general block r's gradient moves with all blocks of the client.
3. Equation 1 weights clients by |D_i|, the proof's mean does not. With unequal sizes the theorem about equation 1 is
   false: two owners of one block, g = (w-1)²/2 and (w+1)²/2, |D_1| = 3|D_2|, no noise, start w = 0. The mean of
   the two stays 0 for ever, so the left-hand side is (1/2)², and the right-hand side goes to 0 with the rates.
4. Assumption 3 "for every W" can hold only if owners' Hessians agree (and, with equation 1's f, not even then: there
   the difference holds (1-p_r) G_r). It is needed at the server's iterates W_t only.
5. σ² bounds a client's whole noise but is counted in each of the R+1 blocks: (R+1)σ² and C_K grow when a block is
   cut in two, which changes nothing that is computed. The noise of each block, σ_r², is what enters.
6. Harmless but loose: (12) doubles its last term; (20) drops a factor τ from its left-hand side, so that the whole of
   (7) is τ times too large; the term discarded after (10) would have cancelled what becomes 48Lτ²Z.
7. Slips of the pen: f(W_T) in (7) is E f(W_T); 1/√(8Lτ) in the theorem is 1/(√8 Lτ) in the proof, and both it and the
   third limit follow from the first, 1/(48Lτ), so only that is used; C_K sums 1/K_r, not 1/R_r; H is τ; and
   ∇g_i(W_[r]) means P_r∇g_i(W).
8. With a cohort the theorem does not hold: a block that is sent in a share q of the rounds sinks q times as slowly.
   With small rates the gradient hardly changes, the right-hand side tends to 8τ Σ_r q_r‖P_r∇f‖² (separable losses),
   and the left-hand side, ‖∇f‖², is larger if 8τq_r < 1 for the blocks that matter.

**What can be shown** (`mended_bound`). Let the objective weight client i in block r by u_ir > 0 and the server average
with a_ir = u_ir/p_r, p_r = Σ_i u_ir, so that P_r∇f = p_r G_r, G_r = Σ_i a_ir P_r∇g_i. Either u_ir = w_i for all blocks
of a client (equation 1: w_i = |D_i|/|D|; blocks may be coupled), or the losses are separable (u_ir = 1/K_r is the f of
the proof). Let S_t = Σ_r p_r‖G_r(W_t)‖², Z = Σ_r p_r ζ_r², ζ_r² >= Σ_i a_ir‖P_r∇g_i(W_t) - G_r(W_t)‖², σ_r² bound the
noise of an owner in block r, N = Σ_r p_r σ_r²/K_r and V = Σ_r p_r σ_r², with 1/K_r for Σ_i a_ir². If η_t <= 1/(√8 Lτ),
then

    (Σ_t η_t E S_t)/Σ_t η_t <= 8/(3τ Σ_t η_t) · [f(W_0) - E f(W_T) + LτN Σ_t η_t² + L²τ³(Z + V/3) Σ_t η_t³].

Proof. g_i depends on its own blocks, so f(W+v) <= f(W) + <∇f, v> + (L/2) Σ_r p_r‖v_r‖². Let Δ_r be the round's update,
s a local step, Ḡ_r^s the owners' mean gradient at their own iterates, φ^s = Σ_{i,r} u_ir E‖P_r(W_i^s - W_t)‖². As in
(10), E<G_r, Δ_r> = -(η/2) Σ_s (‖G_r‖² + E‖Ḡ_r^s‖² - E‖G_r - Ḡ_r^s‖²), and Σ_r p_r E‖G_r - Ḡ_r^s‖² <= L²φ^s by Jensen
and Assumption 1, client by client (weights w_i) or block by block (separable). (L/2) Σ_r p_r E‖Δ_r‖² <= Lη²τ Σ_s Σ_r
p_r E‖Ḡ_r^s‖² + Lη²τN, whose first part the kept -(η/2) Σ_s Σ_r p_r E‖Ḡ_r^s‖² outweighs as Lητ <= 1/2. (17) and (18),
summed with weights u, give Σ_s φ^s <= 2η²τ³(S + Z + V/3). Together: E f(W_{t+1}) <= f(W_t) - ητ(1/2 - L²η²τ²) S +
L²η³τ³(Z + V/3) + Lη²τN, the bracket is at least 3/8, and summing over t gives the claim. ∎

‖∇f‖² = Σ_r p_r²‖G_r‖² <= S where p_r <= 1. For equation 1 with equal |D_i| every term in the brackets is at most its
counterpart in (21), so there the printed inequality is true, coupled blocks included, although its proof is not.

**Growth with R.** The paper reads off (7) that more modality-task pairs make the server worse. With the f of its proof
that is the growth of a sum over R+1 blocks: separable blocks never meet, and both sides grow alike. With equation 1,
and as many blocks per client and owners per block as before, nothing in `mended_bound` grows with R; if the number of
clients is fixed instead, N grows, because each block has fewer owners to average its noise.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from tap_jax.errors import UserError

Values = Sequence[float] | np.ndarray  # one per block
MENDED_OVER_PRINTED = 48 / math.sqrt(8)  # largest rate of `mended_bound` over that of Theorem 1


class Terms(NamedTuple):
    """The four terms of equation 7, in its order; squared gradient norm each. The bound is their sum."""

    start: float  # 8 (f(W_0) - E f(W_T)) / Σ η: how far there is to go
    drift: float  # 16 (Z + (R+1)σ²/3) τ³L² Σ η³ / Σ η: clients move apart within a round
    heterogeneity: float  # 48 Lτ² Z Σ η² / Σ η
    noise: float  # 16 Lτ σ² C_K Σ η² / Σ η


def largest_rate(smoothness: float, local_steps: int) -> float:
    """The largest rate η_t that Theorem 1 allows: 1/(48Lτ), its other two limits being larger (module text, 7).

    Args:
      smoothness: L > 0.
      local_steps: τ >= 1.
    """
    _need("smoothness", smoothness, smoothness > 0, "be positive")
    _need("local_steps", local_steps, local_steps >= 1, "be at least 1")
    return 1 / (48 * smoothness * local_steps)


def terms(
    rates: ArrayLike,
    decrease: float,
    *,
    smoothness: float,
    local_steps: int,
    noise: float,
    heterogeneity: Values,
    owners: Values,
) -> Terms:
    """The four terms of equation 7 as printed; arguments as for `bound`."""
    first, second, third = _moments(rates)
    _check(smoothness, local_steps, {"heterogeneity": heterogeneity, "owners": owners, "noise": [noise]})
    z, blocks = float(np.sum(heterogeneity)), len(owners)
    c_k = float(np.sum(1 / np.asarray(owners, float)))
    return Terms(
        start=8 * decrease / first,
        drift=16 * (z + blocks / 3 * noise) * local_steps**3 * smoothness**2 * third / first,
        heterogeneity=48 * smoothness * local_steps**2 * z * second / first,
        noise=16 * smoothness * local_steps * noise * c_k * second / first,
    )


def bound(
    rates: ArrayLike,
    decrease: float,
    *,
    smoothness: float,
    local_steps: int,
    noise: float,
    heterogeneity: Values,
    owners: Values,
) -> float:
    """Right-hand side of Theorem 1 (equation 7), as printed: a bound on the mean squared gradient of the server model.

    The left-hand side is (Σ_t η_t E‖∇f(W_t)‖²) / Σ_t η_t over rounds t = 0..T-1. The module text has the assumptions,
    what the derivation leaves open, and where the statement fails. The number is returned for any rates; the
    theorem is about rates up to `largest_rate`.

    Args:
      rates: η_t > 0, shape [T].
      decrease: f(W_0) - E f(W_T), or f(W_0) minus any lower bound of f.
      smoothness: L of Assumption 1.
      local_steps: τ, local iterations of a round.
      noise: σ² of Assumption 2, a variance: of a client's whole minibatch gradient.
      heterogeneity: ζ_r² of Assumption 3, shape [R+1].
      owners: K_r, clients that own block r, shape [R+1].

    Raises:
      UserError: an argument is out of its range, or the last two differ in length.

    Example:
      A hundred rounds at the largest rate that the theorem allows, 1/(48Lτ); two blocks with eight and four owners.

      >>> import tap_jax as tap
      >>> blocks = {"heterogeneity": [0, 1], "owners": [8, 4]}
      >>> round(tap.bound([1 / 240] * 100, 3.0, smoothness=1.0, local_steps=5, noise=1.0, **blocks), 3)
      62.783
    """
    found = terms(
        rates,
        decrease,
        smoothness=smoothness,
        local_steps=local_steps,
        noise=noise,
        heterogeneity=heterogeneity,
        owners=owners,
    )
    return float(sum(found))


def mended_bound(
    rates: ArrayLike,
    decrease: float,
    *,
    smoothness: float,
    local_steps: int,
    noise: Values,
    heterogeneity: Values,
    owners: Values,
    shares: Values,
) -> float:
    """The bound that the module text proves, on (Σ_t η_t E Σ_r p_r‖G_r(W_t)‖²) / Σ_t η_t; for rates up to 1/(√8 Lτ).

    Where all shares are at most 1 it bounds the left-hand side of Theorem 1 too; where they are 1, both are the same.

    Args:
      rates: η_t > 0, shape [T].
      decrease: f(W_0) - E f(W_T).
      smoothness: L.
      local_steps: τ.
      noise: σ_r², the largest noise variance of an owner's gradient in block r, shape [R+1].
      heterogeneity: ζ_r², mean squared deviation of the owners' gradients in block r from their own mean G_r, at the
        server's iterates, shape [R+1].
      owners: K_r, or 1/Σ_i a_ir² where the server's mean over owners is weighted, shape [R+1].
      shares: p_r with P_r∇f = p_r G_r, shape [R+1]: K_r/K for equation 1 with equal clients, in general Σ_{i owns r}
        |D_i|/|D|; 1 for the objective that the paper's proof needs (separable losses).

    Raises:
      UserError: an argument is out of its range, or the last four differ in length.
    """
    first, second, third = _moments(rates)
    vectors = {"noise": noise, "heterogeneity": heterogeneity, "owners": owners, "shares": shares}
    _check(smoothness, local_steps, vectors)
    lengths = len(noise), len(shares), len(owners)
    _need("noise, shares and owners", lengths, len(set(lengths)) == 1, "have one entry per block each")
    p, sigma = np.asarray(shares, float), np.asarray(noise, float)
    z, v = float(p @ np.asarray(heterogeneity, float)), float(p @ sigma)
    n = float(p @ (sigma / np.asarray(owners, float)))
    noisy = smoothness * local_steps * n * second
    drifting = smoothness**2 * local_steps**3 * (z + v / 3) * third
    return 8 * (decrease + noisy + drifting) / (3 * local_steps * first)


def _moments(rates: ArrayLike) -> tuple[float, float, float]:
    """Σ η, Σ η², Σ η³."""
    eta = np.asarray(rates, float)
    _need("rates", rates, eta.ndim == 1 and eta.size > 0, "be a list of numbers")
    _need("rates", eta.min(), eta.min() > 0, "be positive")
    return float(eta.sum()), float((eta**2).sum()), float((eta**3).sum())


def _check(smoothness: float, local_steps: int, vectors: dict[str, Values]) -> None:
    largest_rate(smoothness, local_steps)
    for name, values in vectors.items():
        lowest = np.min(np.asarray(values, float), initial=np.inf)
        if name == "owners":
            _need(name, lowest, lowest >= 1, "be at least 1 for every block")
        else:
            _need(name, lowest, lowest >= 0, "be at least 0")
    lengths = len(vectors["heterogeneity"]), len(vectors["owners"])
    _need("heterogeneity and owners", lengths, lengths[0] == lengths[1] > 0, "have one entry per block each")


def _need(name: str, value: object, fine: bool, remedy: str) -> None:
    if not fine:
        raise UserError(f"{name} must {remedy}, not {value}")
