"""The function behind every score: the models of a cohort's clients on rows of test samples, per task group.

Letters: D shards, E devices of a shard, N rows of a device, S samples of a row, A answer length.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from tap_jax.blocks import Params, Tree
from tap_jax.data.device_data import cut
from tap_jax.data.packing import RowShape
from tap_jax.data.task_groups import TaskGroup
from tap_jax.data.text import WordPiece
from tap_jax.engine.engine import Engine
from tap_jax.engine.objective import Part, take_parts
from tap_jax.engine.packed import Layout
from tap_jax.engine.parallel import CLIENTS, ROWS, SHARED
from tap_jax.models.server_model import ServerModel
from tap_jax.tasks import Task

Output = Callable[[Task, Array, Mapping[str, Array]], Array]  # (task, outputs, batch) -> what is kept of them


class TestRows(struct.PyTreeNode):
    """Rows of one task group and shape: client int32 [N], stream int32 [N], ids int32 [N, S]; `count` of them are real.

    On the host with the axes [D, E] in front; ids of padding are -1. Of packed rows, text_at int32 [N, S] as in
    `sampling.Table`.
    """

    client: Any
    stream: Any
    ids: Any
    count: Any
    text_at: Any = None

    @classmethod
    def empty(cls, shards: int, devices: int, capacity: int, shape: RowShape) -> "TestRows":
        """Room for `capacity` rows on every device; numpy."""
        axes = shards, devices, capacity
        return cls(
            np.zeros(axes, np.int32),
            np.zeros(axes, np.int32),
            np.full((*axes, shape.samples), -1, np.int32),
            np.zeros(axes[:2], np.int32),
            np.full((*axes, shape.samples), shape.texts.total, np.int32) if shape.texts else None,
        )

    def add(
        self, shard: int, device: int, client: int, stream: int, ids: np.ndarray, text_at: np.ndarray | None = None
    ) -> int:
        """Fills the next row of one device -> its number."""
        row = int(self.count[shard, device])
        self.client[shard, device, row], self.stream[shard, device, row] = client, stream
        self.ids[shard, device, row, : len(ids)] = ids
        if self.text_at is not None:
            self.text_at[shard, device, row, : len(ids)] = text_at
        self.count[shard, device] += 1
        return row


def predictor(
    engine: Engine, group: TaskGroup, shapes: Sequence[RowShape], tokenizer: WordPiece | None, output: Output
) -> Callable:
    """(frozen, fields, params, layout, rows) -> per shape [D, E, N, S, ...]: what `output` makes of it, or answers.

    Args:
      shapes: of the rows, which are a tuple of one `TestRows` for each.
    """
    model, table = engine.finished.model, engine.finished.tables[group.name]
    predict = functools.partial(_predict, output, model, group.tasks[0], table, tuple(shapes), tokenizer)
    return engine.devices.over(predict, (SHARED, SHARED, CLIENTS, CLIENTS, ROWS), out=ROWS)


def scored(task: Task, outputs: Array, batch: Mapping[str, Array]) -> Array:
    """Squared errors or labels of a row's samples, [S]."""
    if task.kind == "image_generation":
        return jnp.square(outputs - batch["images"]).mean((1, 2, 3))
    return jnp.argmax(outputs, -1).astype(jnp.int32)


def image(task: Task, outputs: Array, batch: Mapping[str, Array]) -> Array:
    """The reconstructions themselves, [S, 64, 64, 3]."""
    return outputs.astype(jnp.float32)


def _predict(
    output: Output,
    model: ServerModel,
    task: Task,
    table: Mapping[str, Part],
    shapes: Sequence[RowShape],
    tokenizer: WordPiece | None,
    frozen: Tree,
    fields: Mapping[str, Array],
    params: Params,
    layout: Layout,
    tests: Sequence[TestRows],
) -> tuple[Array, ...]:
    """Predictions of every row of a shard, per shape [N, S, ...]; rows past `count` are not computed."""

    def one(rows: TestRows, shape: RowShape, n: Array) -> Array:
        parts = take_parts(params, layout, table, rows.client[n], rows.stream[n])
        text_at = None if rows.text_at is None else rows.text_at[n]
        batch = cut(fields, jnp.maximum(rows.ids[n], 0), shape, text_at)
        vectors = model.represent(frozen, parts, task, batch)
        if task.kind == "text_generation" and tokenizer:
            length = batch["answers"].shape[1] - 1
            return model.generate(
                parts["head"],
                task,
                vectors,
                length=length,
                start=tokenizer.cls_id,
                stop=tokenizer.sep_id,
                wanted=rows.ids[n] >= 0,
            )
        return output(task, model.decode(parts["head"], task, vectors, batch), batch)

    def all_of(rows: TestRows, shape: RowShape) -> Array:
        like = jax.eval_shape(lambda n: one(rows, shape, n), jnp.int32(0))
        out = jnp.zeros((rows.client.shape[0], *like.shape), like.dtype)
        return jax.lax.fori_loop(0, rows.count, lambda n, out: out.at[n].set(one(rows, shape, n)), out)

    return tuple(map(all_of, tests, shapes))
