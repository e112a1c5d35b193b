"""Optimizer states that persist, within a round: what a training leaves stays on the devices until the round is over.

So no training waits for the host to fetch what the one before it has left.

Letters: D shards, G slots of a shape class, n parameters of one of its blocks.
"""

import dataclasses

from tap_jax.engine.packed import Packed
from tap_jax.engine.transfer import Transfer
from tap_jax.methods.base import ClientModels


@dataclasses.dataclass(frozen=True, eq=False)
class OnDevices:
    """A model's optimizer states (a value of `State.moments`), those of a cohort on its devices.

    Attributes:
      before: all clients' states, as they were before the cohort trained.
      transfer: of the cohort. states: what it has left, [D, G, 1 + 2n].
    """

    before: ClientModels
    transfer: Transfer
    states: Packed


def after_training(moments: ClientModels | OnDevices, transfer: Transfer, states: Packed) -> OnDevices:
    """The states of a model after a training of a cohort, which leaves `states`."""
    again = isinstance(moments, OnDevices) and moments.transfer is transfer
    return OnDevices(moments.before if again else on_host(moments), transfer, states)


def for_training(moments: ClientModels | OnDevices, transfer: Transfer) -> Packed:
    """The states of a model with which a cohort goes on, [D, G, 1 + 2n]."""
    if isinstance(moments, OnDevices) and moments.transfer is transfer:
        return moments.states
    return transfer.upload(on_host(moments), transfer.engine.moments_like)


def on_host(moments: ClientModels | OnDevices) -> ClientModels:
    """All clients' states of a model, in memory or on disk."""
    if not isinstance(moments, OnDevices):
        return moments
    return moments.transfer.exchanged(moments.before, moments.states, moments.transfer.engine.moments_like)
