"""X of one round and W̃ of the next in one program (`engine.pipeline_rounds`).

X's training does not change what the server sends, so the next round's federated training can go beside it: as one
local training of both cohorts' clients, each with its own round's minibatches, dropout and learning rate. Where a
round's few clients leave devices without work, both cohorts together fill them.

What has been trained ahead is no part of the state. It waits here for a round with the same number, the same clients
and the very same server's blocks (the object, not its values). Any other round, as the first one and that after a
resume, trains its W̃ alone, but by the same program with nobody beside it: to the same bits.

Letters: D shards, E devices of a shard, K positions of a shard in each of the two cohorts, G slots of a group, O tasks.
"""

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tap_jax import blocks
from tap_jax.blocks import Blocks, Partition, Seats, Stack
from tap_jax.engine.local_training import Losses
from tap_jax.engine.parallel import CLIENTS
from tap_jax.engine.programs import abstract

if TYPE_CHECKING:
    from tap_jax.engine.cohort import Cohort, Phase
    from tap_jax.engine.engine import Engine

PURPOSE = "federated"  # what is trained ahead


class Trained(NamedTuple):
    """W̃ of a round's clients after their local training, and what it was made from."""

    round: int
    clients: tuple[int, ...]
    server: Stack
    stack: Stack
    losses: Losses


class Pipeline:
    """Of one engine: what it has trained ahead, and the program that does so.

    W̃'s positions, slots and rows come first, so that they are in the same places whoever is beside them.
    """

    def __init__(self, engine: "Engine"):
        self.engine = engine
        self._waiting: Trained | None = None
        self._together = jax.jit(self._join, out_shardings=engine.by_client)
        self._apart = jax.jit(_halves, out_shardings=engine.by_client)

    @property
    def runs(self) -> bool:
        """Whether W̃ is trained by this program: not where it needs states of the optimizer, or a teacher's place."""
        settings, rule = self.engine.settings, self.engine.rule
        return settings.pipelined > 0 and not settings.persist and (rule.also_alone or not rule.guided)

    def reaches(self, cohort: "Cohort") -> bool:
        """Whether the round after this cohort's can be trained ahead: it will be played, and it is known by whom."""
        return self.runs and cohort.following is not None and cohort.round + 1 < self.engine.settings.pipelined

    def forget(self) -> None:
        """Lets go of what was trained ahead: no round follows."""
        self._waiting = None

    def federated(self, cohort: "Cohort", server: Stack) -> tuple[Stack, Losses]:
        """The cohort's W̃ after local training from the server's blocks, and its losses."""
        found, self._waiting = self._waiting, None
        if found and (found.round, found.clients) == (cohort.round, cohort.given) and found.server is server:
            return found.stack, found.losses
        del found
        cohort.begin((0, PURPOSE))
        nobody = self.engine.cohort((), cohort.round)
        return self._train(cohort, server, nobody, None, nobody.phase(PURPOSE))[0]

    def train_both(self, cohort: "Cohort", stack: Stack, phase: "Phase", server: Stack) -> tuple[Stack, Losses]:
        """Local training of a cohort's stack, which is consumed, and of the next round's W̃ from the server's blocks.

        Returns:
          The cohort's stack and losses; the others wait for `federated`.
        """
        following = self.engine.cohort(cohort.following, cohort.round + 1)
        trained, mine = self._train(following, server, cohort, stack, phase)
        self._waiting = Trained(following.round, following.given, server, *trained)
        return mine

    def _train(self, first: "Cohort", server: Stack, second: "Cohort", stack: Stack | None, phase: "Phase"):
        """W̃ of the first cohort beside the stack of the second (None: of zeros) -> (stack, losses) of each."""
        engine = self.engine
        both = self._together(server, first.seats, stack)
        for matrix in (stack or {}).values():
            matrix.delete()
        seats = engine.devices.put(_seats(first, second), CLIENTS)
        both, _, losses = engine.train(both, None, None, seats, first.phase(PURPOSE).beside(phase))
        split = jax.tree.map(lambda leaf: leaf.reshape(len(first.table), 2, -1, leaf.shape[-1]), losses)
        losses = [jax.tree.map(lambda leaf, n=n: leaf[:, n].reshape(-1, leaf.shape[-1]), split) for n in (0, 1)]
        return tuple(zip(self._apart(both), losses, strict=True))

    def prepare(self, cohort: "Cohort") -> None:
        """Starts compiling the program in the background, where there is use for it."""
        engine = self.engine
        if not self.runs:
            return
        phase = cohort.phase(PURPOSE)
        phase = phase.beside(phase)
        engine._train.prepare(
            *abstract((engine.frozen, engine.arrays), engine.shared),
            _twice(cohort.abstract_stack()),
            None,
            None,
            abstract(_seats(cohort, cohort), engine.by_client),
            abstract(phase.plan, engine.by_row),
            *abstract((phase.rate, phase.key), engine.by_client),
        )

    def _join(self, server: Stack, seats: Seats, stack: Stack | None) -> Stack:
        federated = blocks.broadcast(server, self.engine.server_seats, seats)
        stack = stack or jax.tree.map(jnp.zeros_like, federated)
        return {group: jnp.concatenate([matrix, stack[group]], 1) for group, matrix in federated.items()}


def _seats(first: "Cohort", second: "Cohort") -> Seats:
    """Of both cohorts, leaves [D, ...]; numpy."""
    partition = first.engine.partition
    shards = [beside(partition, *pair) for pair in zip(first.shard_seats, second.shard_seats, strict=True)]
    return jax.tree.map(lambda *x: np.stack(x), *shards)


def beside(partition: Partition, one: Seats, other: Seats) -> Seats:
    """Seats of two cohorts in one stack: positions and slots of the other behind those of the first; numpy."""
    positions, size = len(one.slot), len(one.slot) + len(other.slot)
    sizes = np.array([len(one.client[group]) for group in partition.groups])
    client = {
        group: np.concatenate([np.where(mine < positions, mine, size), positions + other.client[group]])
        for group, mine in one.client.items()
    }
    return Seats(
        np.concatenate([one.slot, sizes + other.slot]).astype(np.int32),
        {group: clients.astype(np.int32) for group, clients in client.items()},
        {group: np.concatenate([mine, other.block[group]]) for group, mine in one.block.items()},
    )


def _halves(stack: Stack) -> tuple[Stack, Stack]:
    """Stacks [D, 2G, n] -> two of [D, G, n]."""
    first = {group: matrix[:, : matrix.shape[1] // 2] for group, matrix in stack.items()}
    return first, {group: matrix[:, matrix.shape[1] // 2 :] for group, matrix in stack.items()}


def _twice(shapes: Blocks) -> Stack:
    """Shapes [D, G, n] -> [D, 2G, n]."""
    return {
        group: jax.ShapeDtypeStruct(
            (shape.shape[0], 2 * shape.shape[1], *shape.shape[2:]), shape.dtype, sharding=shape.sharding
        )
        for group, shape in shapes.items()
    }
