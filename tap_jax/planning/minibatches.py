"""A client's minibatches as they are drawn for the engine, stream by stream and not yet cut into rows."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from tap_jax.data.packing import padded
from tap_jax.data.sampling import ClientData, draw_plan
from tap_jax.data.task_groups import TaskGroup, fields
from tap_jax.data.text import TaskArrays
from tap_jax.tasks import Stream


@dataclasses.dataclass(frozen=True)
class Batch:
    """The samples of one stream in a client's minibatch, B of them.

    Attributes:
      stream: which.
      fields: "images" (uint8), "tokens", "labels", "answers": [B, ...].
      weight: these samples' part of their task's loss; 1 where the task has one domain.
      share: λ_o, the task's part of the minibatch.
    """

    stream: Stream
    fields: Mapping[str, Any]
    weight: float
    share: float

    def __len__(self) -> int:
        return len(next(iter(self.fields.values())))


def client_minibatches(
    data: Sequence[ClientData],
    client: int,
    task_groups: Sequence[TaskGroup],
    arrays: Mapping[str, TaskArrays],
    *,
    seed: int,
    round_: int,
    phase: str,
    batch: int,
    steps: int,
    epochs: int | None,
) -> list[list[Batch]]:
    """Per step the batches of one client's minibatch; arguments as of `sampling.draw_plan`.

    Args:
      client: its number.
      arrays: task -> training set.
    """
    plan = draw_plan(
        data,
        np.array([client]),
        task_groups,
        seed=seed,
        round_=round_,
        phase=phase,
        batch=batch,
        shapes={group.name: padded(batch) for group in task_groups},  # all samples of a stream in one row
        steps=steps,
        capacities={group.name: (len(group.streams),) for group in task_groups},
        starts={task.name: 0 for group in task_groups for task in group.tasks},
        epochs=epochs,
    )
    found: list[list[Batch]] = []
    for step in np.flatnonzero(plan.active[:, 0]):
        found.append([])
        for group in task_groups:
            (rows,) = plan.rows[group.name]
            for number in range(rows.count[step]):
                row = jax.tree.map(lambda leaf, at=(step, number): leaf[at], rows.table)
                stream, real = group.streams[row.stream], row.weights > 0
                of = fields(arrays[stream.task.name])
                samples = {name: array[row.ids[real]] for name, array in of.items()}
                found[-1].append(Batch(stream, samples, float(row.weights.sum()), float(row.share)))
    return found
