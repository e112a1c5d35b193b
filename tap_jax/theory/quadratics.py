"""Federations of heterogeneous block quadratics: every constant of Theorem 1 is known, and FedAvg takes milliseconds.

Client k owns m blocks of d parameters, x_k = those blocks one after the other, and g_k(W) = x_k'H_k x_k/2 - b_k'x_k.
A minibatch gradient is H_k x_k - b_k + noise, Gaussian with E‖noise‖² = σ², independent over clients and steps.

Letters: K clients, R+1 blocks, m blocks of a client, d parameters of a block, S seeds, T rounds.
"""

import dataclasses
import functools
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Quadratics:
    """A federation of block quadratics.

    Attributes:
      blocks: int [K, m], the blocks a client owns, all different; every block 0..R has an owner.
      hessians: [K, m·d, m·d], H_k, symmetric, of either sign.
      linear: [K, m·d], b_k.
      noise: σ² of Assumption 2, spread evenly over the m·d coordinates.
      data: [K], w_k = |D_k|/|D|, adding up to 1.
    """

    blocks: np.ndarray
    hessians: np.ndarray
    linear: np.ndarray
    noise: float
    data: np.ndarray

    @functools.cached_property
    def owners(self) -> np.ndarray:
        """K_r, int [R+1]."""
        return np.bincount(self.blocks.ravel())

    @property
    def shape(self) -> tuple[int, int]:
        """(R+1, d), the server's."""
        return len(self.owners), self.linear.shape[1] // self.blocks.shape[1]

    @functools.cached_property
    def smoothness(self) -> float:
        """L of Assumption 1: the largest absolute eigenvalue of any client's Hessian; exact."""
        return float(np.abs(np.linalg.eigvalsh(self.hessians)).max())

    @functools.cached_property
    def separable(self) -> bool:
        """Whether no Hessian couples two blocks of its client."""
        clients, mine = self.blocks.shape
        tiles = self.hessians.reshape(clients, mine, self.shape[1], mine, self.shape[1]).swapaxes(2, 3)
        return not tiles[:, ~np.eye(mine, dtype=bool)].any()

    def per_client(self) -> np.ndarray:
        """Weights u_kj = w_k, [K, m]: those of the objective of equation 1."""
        return np.broadcast_to(self.data[:, None], self.blocks.shape)

    def per_block(self) -> np.ndarray:
        """Weights u_kj = 1/K_r, [K, m]: the plain mean over owners, and the objective that the proof needs."""
        return 1 / self.owners[self.blocks]

    def take(self, server: np.ndarray) -> np.ndarray:
        """Each client's blocks, [..., R+1, d] -> [..., K, m·d]."""
        return server[..., self.blocks, :].reshape(*server.shape[:-2], *self.linear.shape)

    def gradients(self, local: np.ndarray) -> np.ndarray:
        """∇g_k at each client's own x_k, [..., K, m·d] -> [..., K, m·d]."""
        return np.einsum("kij,...kj->...ki", self.hessians, local) - self.linear

    def add_up(self, weights: np.ndarray, local: np.ndarray) -> np.ndarray:
        """Σ_{k owns r} u_kr x_{k,r}: weights [..., K, m] and [..., K, m·d] -> [..., R+1, d]."""
        clients, mine = self.blocks.shape
        pieces = local.reshape(*local.shape[:-2], clients * mine, -1)
        flat = weights.reshape(*weights.shape[:-2], clients * mine, 1)
        to_block = (np.arange(len(self.owners))[:, None] == self.blocks.ravel()).astype(float)
        return to_block @ (flat * pieces)

    def shares(self, weights: np.ndarray) -> np.ndarray:
        """p_r = Σ_{k owns r} u_kr, [R+1]."""
        return np.bincount(self.blocks.ravel(), weights.ravel())

    def value(self, weights: np.ndarray, server: np.ndarray) -> np.ndarray:
        """f = Σ_k Σ_j u_kj g_{k,j}, [..., R+1, d] -> [...]; g_{k,j} is the part of g_k that x_k's block j writes out.

        With weights `per_client` that is Σ_k w_k g_k, equation 1. Other weights need a separable federation.
        """
        local = self.take(server)
        half = (self.gradients(local) - self.linear) / 2  # (H x - 2b)/2, so that x·half = x'Hx/2 - b'x
        pieces = (local * half).reshape(*local.shape[:-1], self.blocks.shape[1], -1).sum(-1)
        return (pieces * weights).sum((-2, -1))

    def gradient(self, weights: np.ndarray, server: np.ndarray) -> np.ndarray:
        """∇f of `value`, [..., R+1, d]."""
        return self.add_up(weights, self.gradients(self.take(server)))

    def stationary(self, weights: np.ndarray) -> np.ndarray:
        """The W with ∇f(W) = 0, [R+1, d]."""
        basis = np.eye(math.prod(self.shape)).reshape(-1, *self.shape)
        zero = self.gradient(weights, np.zeros(self.shape))
        columns = (self.gradient(weights, basis) - zero).reshape(len(basis), -1)
        return np.linalg.solve(columns.T, -zero.ravel()).reshape(self.shape)


def draw(
    pairs: int, owners: int, *, seed: int, coupled: bool, size: int = 3, noise: float = 1.0, uneven: float = 1.0
) -> Quadratics:
    """A random federation like the paper's: block 0 is all clients', blocks 1..R belong to one modality-task pair each.

    Client k owns blocks 0 and 1 + k mod R, so K = R·K_r. Linear terms are a standard normal draw per pair and block
    plus one per client.

    Args:
      pairs: R, modality-task pairs.
      owners: K_r of r = 1..R; block 0 has K_0 = K.
      seed: of the draw.
      coupled: whether Hessians are full and each client's own, eigenvalues from -0.1 to 1 (not convex); else a
        block's owners share one Hessian, eigenvalues from 0.1 to 1, and no two blocks meet: Assumption 3
        then holds for every W.
      size: d.
      noise: σ².
      uneven: how many times the data of the others the first half of each block's owners have.
    """
    rng = np.random.default_rng([seed, pairs, owners])
    clients, mine = pairs * owners, 2
    blocks = np.stack([np.zeros(clients, int), 1 + np.arange(clients) % pairs], 1)
    center = rng.standard_normal((pairs, mine * size))
    linear = center[blocks[:, 1] - 1] + rng.standard_normal((clients, mine * size))
    if coupled:
        hessians = _symmetric(rng, clients, mine * size, -0.1)
    else:
        by_block = _symmetric(rng, pairs + 1, size, 0.1)
        hessians = np.zeros((clients, mine, size, mine, size))
        for j in range(mine):
            hessians[:, j, :, j] = by_block[blocks[:, j]]
        hessians = hessians.reshape(clients, mine * size, mine * size)
    data = np.where(np.arange(clients) // pairs < (owners + 1) // 2, uneven, 1.0)
    return Quadratics(blocks, hessians, linear, noise, data / data.sum())


def _symmetric(rng: np.random.Generator, count: int, size: int, lowest: float) -> np.ndarray:
    """Random symmetric matrices [count, size, size], eigenvalues uniform between `lowest` and 1."""
    turn = np.linalg.qr(rng.standard_normal((count, size, size)))[0]
    eigenvalues = rng.uniform(lowest, 1, (count, 1, size))
    full = (turn * eigenvalues) @ turn.transpose(0, 2, 1)
    return (full + full.transpose(0, 2, 1)) / 2


def fedavg(
    federation: Quadratics,
    start: np.ndarray,
    rates: np.ndarray,
    *,
    local_steps: int,
    weights: np.ndarray,
    seeds: int,
    seed: int,
    cohort: int | None = None,
) -> np.ndarray:
    """Component-wise FedAvg (Sec. 3.1) with plain SGD; S runs side by side that differ in noise and cohorts.

    Args:
      federation: whose clients train.
      start: W_0, [R+1, d].
      rates: η_t, [T].
      local_steps: τ.
      weights: the server's weights, [K, m]; each block's mean is over its present owners.
      seeds: S.
      seed: of noise and cohorts.
      cohort: clients of a round, drawn uniformly; None is all, as Theorem 1 has it.

    Returns:
      The server's iterates W_0..W_T, [T+1, S, R+1, d].
    """
    rng = np.random.default_rng(seed)
    clients = len(federation.data)
    deviation = np.sqrt(federation.noise / federation.linear.shape[1])
    server = np.broadcast_to(start, (seeds, *start.shape))
    path = [server]
    for rate in rates:
        local = federation.take(server)
        for _ in range(local_steps):
            noise = deviation * rng.standard_normal(local.shape)
            local = local - rate * (federation.gradients(local) + noise)
        present = weights * np.ones((seeds, 1, 1))
        if cohort is not None:
            absent = rng.random((seeds, clients)).argsort(1).argsort(1) >= cohort
            present[absent] = 0
        total = federation.add_up(present, np.ones_like(local))
        mean = federation.add_up(present, local) / np.where(total > 0, total, 1)
        server = np.where(total > 0, mean, server)
        path.append(server)
    return np.stack(path)
