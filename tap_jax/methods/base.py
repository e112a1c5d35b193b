"""What a method is: pure functions of the state and of a cohort that can train.

The engine knows no method by name. It hands a method a `Cohort`: the clients of a round (or of a pass over all
clients) with the compiled operations on their stacks. A method composes them; see `methods/tap.py`.

Letters: K clients of the federation, P positions of a cohort (some may be empty), O tasks, R blocks.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from flax import struct
from jax import Array

from tap_jax.blocks import Blocks, Stack


class State(struct.PyTreeNode):
    """All that a run carries from round to round; nothing else is needed to resume it.

    Attributes:
      round: rounds done.
      server: W̃, stack with one slot per block.
      chains: name -> one mapping of owned blocks per client, on the host. "personal" is X, "local" the chain of a
        client that never communicates.
      local_loss, personal_loss: h^(l), h^(p), float32 [K, O]; +inf before the first participation.
      replacements: int32 [K, O], how often R_i[o] was 1.
      finite: name of a trained chain ("federated" or one of `chains`) -> bool [K, O]: the task's loss has always
        been a number.
      moments: where optimizer states persist, name of a trained chain -> per client, block -> float32 [1 + 2n]: steps
        taken, first and second moments; else empty. Cohorts are given them and the loop takes them back: methods
        need not know.
    """

    round: int
    server: Stack
    chains: Mapping[str, tuple[Blocks, ...]]
    local_loss: np.ndarray
    personal_loss: np.ndarray
    replacements: np.ndarray
    finite: Mapping[str, np.ndarray]
    moments: Mapping[str, tuple[Blocks, ...]] = struct.field(default_factory=dict)


class Losses(Protocol):
    """Losses of a phase: `mean(history)` float32 [P, O] over the steps that saw the task, `seen` bool [P, O].

    A client whose blocks are not all numbers at the end has NaN for every task it saw.
    """

    seen: Array

    def mean(self, history: str = ...) -> Array:
        """Mean loss of every client and task."""


class Cohort(Protocol):
    """Clients that train together.

    Attributes:
      clients: int [P], client numbers, -1 at an empty position.
    """

    clients: np.ndarray

    def broadcast(self, server: Stack) -> Stack:
        """W̃[i] for every client."""

    def load(self, chain: Sequence[Blocks] | Mapping[int, Blocks]) -> Stack:
        """The clients' blocks from a chain of the state."""

    def unload(self, stack: Stack) -> dict[int, Blocks]:
        """Client number -> its blocks, on the host."""

    def train(self, stack: Stack, purpose: str, *, post: bool = False, teacher: Stack | None = None):
        """Local training -> (stack, Losses): τ steps of the round, or P steps after the last one.

        `purpose` names the draw of minibatches and dropout. The stack given is consumed. With a teacher the loss
        is equation 6.
        """

    def aggregate(self, server: Stack, stack: Stack, losses: Losses) -> Stack:
        """Component-wise FedAvg; clients whose loss is not finite have no say."""

    def replace(self, personal: Stack, federated: Stack, indicator: Array) -> Stack:
        """Equation 4 with R = `indicator` bool [P, O]."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A federated algorithm.

    Attributes:
      chains: names of the per-client chains that the state must carry.
      round: (cohort, state) -> (state, metrics); metrics maps names to arrays [P, O].
      finish: (cohort, state, variants) -> variant -> client -> blocks, for one pass over some clients after the
        last round. It leaves out "fedavg", whose models are the server's blocks.
    """

    chains: tuple[str, ...]
    round: Callable[[Cohort, State], tuple[State, dict[str, Any]]]
    finish: Callable[[Cohort, State, Sequence[str]], dict[str, dict[int, Blocks]]]


def put_rows(table: np.ndarray, clients: np.ndarray, rows: np.ndarray, where: np.ndarray | None = None) -> np.ndarray:
    """`table` [K, O] with the cohort's rows [P, O] written over its clients' (only `where` true, bool [P, O])."""
    out, real = np.array(table), clients >= 0
    rows = np.asarray(rows)[real]
    kept = out[clients[real]]
    out[clients[real]] = rows if where is None else np.where(np.asarray(where)[real], rows, kept)
    return out


def take_rows(table: np.ndarray, clients: np.ndarray) -> np.ndarray:
    """The cohort's rows [P, O] of `table` [K, O]; some row at empty positions."""
    return table[np.maximum(clients, 0)]


def put_chain(chain: tuple[Blocks, ...], update: Mapping[int, Blocks]) -> tuple[Blocks, ...]:
    """The chain with the updated clients' blocks exchanged; the others are the same objects."""
    return tuple(update.get(client, blocks) for client, blocks in enumerate(chain))
