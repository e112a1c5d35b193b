"""The literal form of `engine.lora_gap`."""

import jax
import numpy as np


def pairs(tree):
    """(A, B) of every adapter; leading axes are adapters side by side."""
    if not isinstance(tree, dict):
        return
    if set(tree) == {"a", "b"}:
        for at in np.ndindex(tree["a"].shape[:-2]):
            yield np.float64(tree["a"][at]), np.float64(tree["b"][at])
        return
    for part in tree.values():
        yield from pairs(part)


def literal(clients, weights):
    """‖mean(BA) - mean(B)·mean(A)‖ / ‖mean(BA)‖.

    Args:
      clients: number -> block name -> tree. weights: number -> block name -> w > 0, for what it sent.
    """
    gap = whole = 0.0
    for name in {name for mine in weights.values() for name in mine}:
        senders = [k for k, mine in weights.items() if name in mine]
        total = sum(weights[k][name] for k in senders)
        shares = [weights[k][name] / total for k in senders]
        for adapters in zip(*(pairs(jax.device_get(clients[k][name])) for k in senders), strict=True):
            mean = sum(p * a @ b for p, (a, b) in zip(shares, adapters, strict=True))
            mean_a = sum(p * a for p, (a, _) in zip(shares, adapters, strict=True))
            mean_b = sum(p * b for p, (_, b) in zip(shares, adapters, strict=True))
            gap += np.square(mean - mean_a @ mean_b).sum()
            whole += np.square(mean).sum()
    return np.sqrt(gap / whole)
