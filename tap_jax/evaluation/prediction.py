"""The function behind every score: the models of a cohort's clients on rows of test samples, per family.

Letters: D shards, E devices of a shard, N rows of a device, s samples of a row, A answer length.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from tap_jax.blocks import Seats, Stack
from tap_jax.data.families import Family
from tap_jax.data.store import cut
from tap_jax.data.text import WordPiece
from tap_jax.engine.engine import Engine
from tap_jax.engine.objective import take_parts
from tap_jax.engine.parallel import CLIENTS, ROWS, SHARED
from tap_jax.federation import Task


class TestRows(struct.PyTreeNode):
    """Rows of one family: client int32 [N], variant int32 [N], ids int32 [N, s]; `count` of them are real.

    On the host with the axes [D, E] in front; ids of padding are -1.
    """

    client: Any
    variant: Any
    ids: Any
    count: Any

    @classmethod
    def empty(cls, shards: int, parts: int, capacity: int, microbatch: int) -> "TestRows":
        """Room for `capacity` rows on every device; numpy."""
        shape = shards, parts, capacity
        return cls(
            np.zeros(shape, np.int32),
            np.zeros(shape, np.int32),
            np.full((*shape, microbatch), -1, np.int32),
            np.zeros(shape[:2], np.int32),
        )

    def add(self, shard: int, part: int, client: int, variant: int, ids: np.ndarray) -> int:
        """Fills the next row of one device -> its number."""
        row = int(self.count[shard, part])
        self.client[shard, part, row], self.variant[shard, part, row] = client, variant
        self.ids[shard, part, row, : len(ids)] = ids
        self.count[shard, part] += 1
        return row


def predictor(engine: Engine, family: Family, tokenizer: WordPiece | None, output: Callable) -> Callable:
    """(frozen, fields, stack, seats, rows) -> [D, E, N, s, ...]: what `output` makes of a sample, or generated ids."""
    model, table = engine.finished.model, engine.finished.tables[family.name]
    predict = functools.partial(_predict, output, model, family.tasks[0], table, tokenizer)
    return engine.devices.over(predict, (SHARED, SHARED, CLIENTS, CLIENTS, ROWS), out=ROWS)


def scored(task: Task, outputs: Array, batch: Mapping[str, Array]) -> Array:
    """Squared errors or labels of a row's samples, [s]."""
    if task.kind == "image_generation":
        return jnp.square(outputs - batch["images"]).mean((1, 2, 3))
    return jnp.argmax(outputs, -1).astype(jnp.int32)


def image(task: Task, outputs: Array, batch: Mapping[str, Array]) -> Array:
    """The reconstructions themselves, [s, 64, 64, 3]."""
    return outputs.astype(jnp.float32)


def _predict(output, model, task: Task, table, tokenizer, frozen, fields, stack: Stack, seats: Seats, rows: TestRows):
    """Predictions of every row of a shard, [N, s, ...]; rows past `count` are not computed."""

    def one(n):
        parts = take_parts(stack, seats, table, rows.client[n], rows.variant[n])
        batch = cut(fields, jnp.maximum(rows.ids[n], 0))
        vectors = model.represent(frozen, parts, task, batch)
        if task.kind == "text_generation":
            length = batch["answers"].shape[1] - 1
            return model.generate(
                parts["head"], task, vectors, length=length, start=tokenizer.cls_id, stop=tokenizer.sep_id
            )
        return output(task, model.decode(parts["head"], task, vectors, batch), batch)

    shape = jax.eval_shape(one, jnp.int32(0))
    out = jnp.zeros((rows.client.shape[0], *shape.shape), shape.dtype)
    return jax.lax.fori_loop(0, rows.count, lambda n, out: out.at[n].set(one(n)), out)
