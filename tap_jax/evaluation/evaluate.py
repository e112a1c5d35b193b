"""Every client's model on the test split of each of its tasks : batched, compiled, one program per family.

Letters: D shards, N rows of a shard, s samples of a row, A answer length.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from tap_jax.blocks import Blocks, Seats, Stack
from tap_jax.data.families import Family, offsets
from tap_jax.data.store import cut, device_arrays
from tap_jax.data.text import TaskArrays, WordPiece
from tap_jax.engine import parallel
from tap_jax.engine.cohort import Cohort, Engine
from tap_jax.engine.local_training import take_parts
from tap_jax.engine.programs import Program, abstract
from tap_jax.evaluation.metrics import TextScorer, accuracy
from tap_jax.evaluation.results import Row
from tap_jax.federation import Task


class TestRows(struct.PyTreeNode):
    """Rows of one family: client int32 [N], variant int32 [N], ids int32 [N, s]; `count` of them are real."""

    client: Any
    variant: Any
    ids: Any
    count: Any


class Evaluator:
    """Scores models of clients.

    Args:
      engine: of the run.
      tests: task name -> test arrays.
      personal: per client, task name -> ids into its test set; None where all have the whole set.
      microbatch: s.
    """

    def __init__(
        self,
        engine: Engine,
        tests: Mapping[str, TaskArrays],
        *,
        tokenizer: WordPiece | None,
        scorer: TextScorer | None,
        personal: Sequence[Mapping[str, np.ndarray]] | None = None,
        microbatch: int = 50,
    ):
        self.engine, self.tests, self.personal, self.microbatch = engine, tests, personal, microbatch
        self.tokenizer, self.scorer = tokenizer, scorer
        self._arrays = device_arrays(engine.families, tests, engine.shared)
        self._starts = {name: at for family in engine.families for name, at in offsets(family, tests).items()}
        self._programs = {family.name: self._program(family) for family in engine.families}

    def _program(self, family: Family) -> Program:
        table = self.engine.tables[family.name]
        predict = functools.partial(_predict, self.engine.model, family.tasks[0], table, self.tokenizer)
        sharded = parallel.over_clients(predict, self.engine.mesh, (False, False, True, True, True))
        return Program(sharded)

    def prepare(self, cohort: Cohort) -> None:
        """Starts compiling the programs of all families, for cohorts like this one, in the background."""
        engine = self.engine
        for family in engine.families:
            rows = self._rows(cohort, family, {})
            self._programs[family.name].prepare(
                *abstract((engine.frozen, self._arrays[family.name]), engine.shared),
                cohort.abstract_stack(),
                *abstract((cohort.seats, rows), engine.by_client),
            )

    def ids(self, client: int, task: str) -> np.ndarray:
        """int64 [.], the client's test samples of a task."""
        return np.arange(len(self.tests[task])) if self.personal is None else self.personal[client][task]

    def predict(
        self, cohort: Cohort, stack: Stack, wanted: Mapping[str, set[int]]
    ) -> dict[tuple[int, str], np.ndarray]:
        """Predictions of the cohort's clients.

        Args:
          wanted: task name -> clients to predict for.

        Returns:
          (client, task) -> labels int32 [n]; mean squared errors float32 [n]; or generated ids int32 [n, A-1].
        """
        pending = []
        for family in self.engine.families:
            rows = self._rows(cohort, family, wanted)
            if rows.count.any():
                values = self._programs[family.name](
                    self.engine.frozen,
                    self._arrays[family.name],
                    stack,
                    cohort.seats,
                    jax.device_put(rows, self.engine.by_client),
                )
                pending.append((family, rows, values))
        results = {}
        for family, rows, values in pending:
            values = np.asarray(values)
            for task in family.tasks:
                variants = [v for v, stream in enumerate(family.streams) if stream.task == task]
                for position, client in enumerate(cohort.clients):
                    if client not in wanted.get(task.name, ()):
                        continue
                    shard, local = divmod(position, cohort.positions)
                    real = slice(rows.count[shard])
                    mine = (rows.client[shard][real] == local) & np.isin(rows.variant[shard][real], variants)
                    ids = rows.ids[shard][real][mine].reshape(-1)
                    found = values[shard][real][mine].reshape(len(ids), *values.shape[3:])
                    at = np.zeros(len(self.tests[task.name]), int)
                    at[ids[ids >= 0] - self._starts[task.name]] = np.flatnonzero(ids >= 0)
                    results[int(client), task.name] = found[at[self.ids(int(client), task.name)]]
        return results

    def _rows(self, cohort: Cohort, family: Family, wanted: Mapping[str, set[int]]) -> TestRows:
        shards = []
        for clients in cohort.clients.reshape(-1, cohort.positions):
            rows = []
            for position, client in enumerate(clients):
                for variant, stream in enumerate(family.streams):
                    if client in wanted.get(stream.task.name, ()):
                        ids = self.ids(int(client), stream.task.name)
                        domain = stream.task.domains.index(stream.domain)
                        mine = self._starts[stream.task.name] + ids[self.tests[stream.task.name].domains[ids] == domain]
                        rows += [
                            (position, variant, mine[start : start + self.microbatch])
                            for start in range(0, len(mine), self.microbatch)
                        ]
            shards.append(rows)
        # One capacity whoever is in the cohort, so that one program serves all.
        needed = np.zeros(len(self.engine.data), int)
        for task in family.tasks:
            most = len(self.tests[task.name]) // self.microbatch + len(task.domains)
            needed += most * self.engine.partition.task_mask[:, self.engine.tasks.index(task)]
        capacity = max(1, int(np.sort(needed)[::-1][: cohort.positions].sum()))
        table = TestRows(
            np.zeros((len(shards), capacity), np.int32),
            np.zeros((len(shards), capacity), np.int32),
            np.full((len(shards), capacity, self.microbatch), -1, np.int32),
            np.array([len(rows) for rows in shards], np.int32),
        )
        for shard, rows in enumerate(shards):
            for n, (position, variant, ids) in enumerate(rows):
                table.client[shard, n], table.variant[shard, n] = position, variant
                table.ids[shard, n, : len(ids)] = ids
        return table

    def score(self, variant: str, client: int, task: Task, predicted: np.ndarray, finite: bool = True) -> list[Row]:
        """Result rows of one client and task; a value is None where training or prediction was not finite."""
        ids, test = self.ids(client, task.name), self.tests[task.name]
        if task.kind.endswith("classification"):
            values = {"accuracy": accuracy(predicted, test.labels[ids])}
        elif task.kind == "image_generation":
            values = {"mse": float(np.mean(predicted, dtype=np.float64))}
        else:
            texts = self.tokenizer.decode(predicted)
            scores = self.scorer.score(texts, [test.references[i] for i in ids])
            values = {name: float(np.mean(value)) for name, value in scores.items()}
        return [
            Row(
                variant=variant,
                client=client,
                task=task.name,
                metric=metric,
                value=value if finite and np.isfinite(value) else None,
            )
            for metric, value in values.items()
        ]

    def evaluate(
        self, variant: str, cohort: Cohort, models: Mapping[int, Blocks], finite: np.ndarray | None = None
    ) -> list[Row]:
        """The own models of a cohort's clients: client number -> blocks; `finite` bool [K, O].

        A model that holds a value that is no number gets no value either: an argmax over NaN would be one.
        """
        mask = self.engine.partition.task_mask
        finite = np.array(mask if finite is None else finite)
        for client, mine in models.items():
            finite[client] &= all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(dict(mine)))
        wanted = {task.name: {k for k in models if mask[k, o]} for o, task in enumerate(self.engine.tasks)}
        return self._score_all(variant, self.predict(cohort, cohort.load(models), wanted), finite)

    def evaluate_server(self, variant: str, server: Stack, finite: np.ndarray | None = None) -> list[Row]:
        """The server's blocks for every client; with common test sets each task is predicted once.

        Args:
          finite: bool [K, O], of the clients' training. A task counts as diverged where it did for all its owners: as
            long as one was heard, the server's blocks are that one's.
        """
        mask = self.engine.partition.task_mask
        if finite is not None:
            finite = mask & (finite & mask).any(0)
        rows = []
        owners = {task.name: np.flatnonzero(mask[:, o]) for o, task in enumerate(self.engine.tasks)}
        wanted = {name: {int(k) for k in (found if self.personal else found[:1])} for name, found in owners.items()}
        for cohort in self.engine.passes(0):
            present = {name: clients & {int(k) for k in cohort.clients} for name, clients in wanted.items()}
            if any(present.values()):
                predicted = self.predict(cohort, cohort.broadcast(server), present)
                rows += self._score_all(variant, predicted, finite)
        if self.personal is None:
            rows = [Row({**row, "client": int(k)}) for row in rows for k in owners[row["task"]]]
        return rows

    def _score_all(self, variant, predicted, finite) -> list[Row]:
        rows = []
        for (client, name), values in predicted.items():
            o = [task.name for task in self.engine.tasks].index(name)
            healthy = True if finite is None else bool(finite[client, o])
            rows += self.score(variant, client, self.engine.tasks[o], values, healthy)
        return rows


def _predict(model, task: Task, table, tokenizer, frozen, fields, stack: Stack, seats: Seats, rows: TestRows):
    """Predictions of every row of a shard, [N, s, ...]; rows past `count` are not computed."""

    def one(n):
        parts, _ = take_parts(stack, seats, table, rows.client[n], rows.variant[n])
        batch = cut(fields, jnp.maximum(rows.ids[n], 0))
        vectors = model.represent(frozen, parts, task, batch)
        if task.kind == "text_generation":
            length = batch["answers"].shape[1] - 1
            return model.generate(
                parts["head"], task, vectors, length=length, start=tokenizer.cls_id, stop=tokenizer.sep_id
            )
        outputs = model.decode(parts["head"], task, vectors, batch)
        if task.kind == "image_generation":
            return jnp.square(outputs - batch["images"]).mean((1, 2, 3))
        return jnp.argmax(outputs, -1).astype(jnp.int32)

    shape = jax.eval_shape(one, jnp.int32(0))
    out = jnp.zeros((rows.client.shape[0], *shape.shape), shape.dtype)
    return jax.lax.fori_loop(0, rows.count, lambda n, out: out.at[n].set(one(n)), out)
