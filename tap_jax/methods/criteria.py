"""Stage 1's question, whether a client's personal blocks of a task give way to its federated ones (eq. 3).

The paper compares the training losses of the round. Its conclusion asks for other evidence; three are here, off by
default. A criterion is one function `Evidence -> bool [P, O]`, so one's own is a few lines; for example

    def never(evidence): return evidence.seen & False      # but at a first participation, see `replacement.first`

Letters: P positions of a cohort, O tasks, R blocks.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from tap_jax.blocks import Params, replacement_indicator
from tap_jax.methods.base import Cohort
from tap_jax.tasks import Task


class Evidence(NamedTuple):
    """What a criterion may look at, after W̃[i]'s local training and before X[i]'s.

    Attributes:
      cohort: the clients, with the operations of `Cohort`.
      federated, personal: W̃[i] and X[i], packed; not to be consumed.
      federated_loss, personal_loss: h^(l), h^(p) float32 [P, O]; h^(p) is +inf before the first participation.
      margin: m, float32 [O] or [P, O].
      seen: bool [P, O], tasks in the round's minibatches.
      tasks: O of them.
    """

    cohort: Cohort
    federated: Params
    personal: Params
    federated_loss: Array
    personal_loss: np.ndarray
    margin: np.ndarray | Array
    seen: Array
    tasks: tuple[Task, ...]


Criterion = Callable[[Evidence], Array]


def loss(evidence: Evidence) -> Array:
    """The paper's: h^(l) + m < h^(p) (eq. 3)."""
    e = evidence
    return replacement_indicator(e.federated_loss, e.personal_loss, e.margin, e.seen)


def held_out(evidence: Evidence) -> Array:
    """Equation 3 with the losses of both models on the client's held-out samples, as they are now.

    Where a client is too small to have any of the task, the paper's criterion decides.
    """
    e = evidence
    federated, personal = e.cohort.held_out_loss(e.federated), e.cohort.held_out_loss(e.personal)
    nothing = (federated == 0) & (personal == 0)
    return jnp.where(nothing, loss(e), replacement_indicator(federated, personal, e.margin, e.seen))


def gradient(evidence: Evidence) -> Array:
    """The way from X[i] to W̃[i] descends: cos(-∇ℓ_o(X[i]), W̃[i] - X[i]) > m over the blocks that the gradient reaches.

    Here m is a cosine, not a loss. A first-order statement: it says that a small step that way would help. The gradient
    is that of one minibatch of the task, so domains that it lacks are left out.
    """
    e = evidence
    way = {name: e.federated[name] - e.personal[name] for name in e.personal}
    length = e.cohort.inner(way, way)
    columns = []
    for o, task in enumerate(e.tasks):
        slope = e.cohort.task_gradient(e.personal, task)
        # The way is cut to the blocks in which the gradient is not 0.
        steepness = e.cohort.inner(slope, slope)
        squares = jnp.where(steepness > 0, length, 0).sum(1) * steepness.sum(1)
        cosine = -e.cohort.inner(slope, way).sum(1) / jnp.sqrt(jnp.where(squares > 0, squares, 1))
        columns.append((squares > 0) & (cosine > jnp.broadcast_to(e.margin, e.seen.shape)[:, o]))
    return e.seen & jnp.stack(columns, 1)


def representation(evidence: Evidence, *, least: float = 0.5) -> Array:
    """Equation 3, where W̃[i] also represents the client's held-out samples much as X[i] does: mean cosine >= `least`.

    Blocks that see the world in another way would not fit those that stay. A client without held-out samples of the
    task has no likeness to go by: there equation 3 decides alone.
    """
    likeness = evidence.cohort.similarity(evidence.federated, evidence.personal)
    return loss(evidence) & ((likeness >= least) | (likeness == 0))


CRITERIA: dict[str, Criterion] = {
    "loss": loss,
    "held_out": held_out,
    "gradient": gradient,
    "representation": representation,
}


def relative_margin(margin: np.ndarray, now: Array, before: np.ndarray) -> Array:
    """m times the running scale of the loss: the mean of h^(l) now and at the client's last participation, [P, O].

    Args:
      margin: m [O], as a part of the loss.
      now, before: h^(l) [P, O]; `before` is +inf where there was none.
    """
    scale = jnp.where(jnp.isfinite(before), (now + jnp.where(jnp.isfinite(before), before, 0)) / 2, now)
    return scale * margin
