"""Every client's model on the test split of each of its tasks (spec 7): batched, compiled, one program per task.

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
    """Rows of one task: client int32 [N], domain int32 [N], ids int32 [N, s]; `count` of them are real."""

    client: Any
    domain: Any
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
        self._arrays = device_arrays(tests, engine.shared)
        self._programs = {task.name: self._program(task) for task in engine.tasks}

    def _program(self, task: Task):
        predict = functools.partial(_predict, self.engine.model, task, self.engine.tables[task.name], self.tokenizer)
        sharded = parallel.over_clients(predict, self.engine.mesh, (False, False, True, True, True))
        return Program(sharded)

    def prepare(self, cohort: Cohort) -> None:
        """Starts compiling the programs of all tasks, for cohorts like this one, in the background."""
        engine = self.engine
        for task in engine.tasks:
            rows = self._rows(cohort, task, set())
            self._programs[task.name].prepare(
                *abstract((engine.frozen, self._arrays[task.name]), engine.shared),
                cohort.abstract_stack(),
                *abstract((cohort.seats, rows), engine.by_client),
            )

    def ids(self, client: int, task: str) -> np.ndarray:
        """int64 [.], the client's test samples of a task."""
        return np.arange(len(self.tests[task])) if self.personal is None else self.personal[client][task]

    def predict(self, cohort: Cohort, stack: Stack, wanted: Mapping[str, set[int]]) -> dict[tuple[int, str], np.ndarray]:
        """Predictions of the cohort's clients.

        Args:
          wanted: task name -> clients to predict for.

        Returns:
          (client, task) -> labels int32 [n]; mean squared errors float32 [n]; or generated ids int32 [n, A-1].
        """
        pending = {}
        for task in self.engine.tasks:
            rows = self._rows(cohort, task, wanted.get(task.name, set()))
            if rows.count.any():
                values = self._programs[task.name](
                    self.engine.frozen,
                    self._arrays[task.name],
                    stack,
                    cohort.seats,
                    jax.device_put(rows, self.engine.by_client),
                )
                pending[task.name] = (rows, values)
        results = {}
        for name, (rows, values) in pending.items():
            values = np.asarray(values)
            for client, position in ((k, p) for p, k in enumerate(cohort.clients) if k in wanted[name]):
                shard, local = divmod(position, cohort.positions)
                mine = np.flatnonzero(rows.client[shard][: rows.count[shard]] == local)
                ids = rows.ids[shard, mine].reshape(-1)
                found = values[shard, mine].reshape(len(ids), *values.shape[3:])
                wished = self.ids(int(client), name)
                at = np.zeros(len(self.tests[name]), int)
                at[ids[ids >= 0]] = np.flatnonzero(ids >= 0)
                results[int(client), name] = found[at[wished]]
        return results

    def _rows(self, cohort: Cohort, task: Task, wanted: set[int]) -> TestRows:
        domains = self.tests[task.name].domains
        shards = []
        for clients in cohort.clients.reshape(-1, cohort.positions):
            rows = []
            for position, client in enumerate(clients):
                if client in wanted:
                    ids = self.ids(int(client), task.name)
                    for domain in range(len(task.domains)):
                        mine = ids[domains[ids] == domain]
                        rows += [
                            (position, domain, mine[start : start + self.microbatch])
                            for start in range(0, len(mine), self.microbatch)
                        ]
            shards.append(rows)
        # One capacity whoever is in the cohort, so that one program serves all.
        holders = min(cohort.positions, int(self.engine.partition.task_mask[:, self.engine.tasks.index(task)].sum()))
        most = holders * (len(domains) // self.microbatch + len(task.domains))
        table = TestRows(
            np.zeros((len(shards), most), np.int32),
            np.zeros((len(shards), most), np.int32),
            np.full((len(shards), most, self.microbatch), -1, np.int32),
            np.array([len(rows) for rows in shards], np.int32),
        )
        for shard, rows in enumerate(shards):
            for n, (position, domain, ids) in enumerate(rows):
                table.client[shard, n], table.domain[shard, n] = position, domain
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

    def evaluate(self, variant: str, models: Sequence[Blocks], finite: np.ndarray | None = None) -> list[Row]:
        """All clients' own models: `models` holds every client's blocks; `finite` bool [K, O]."""
        rows = []
        for cohort in self.engine.passes(0):
            stack = cohort.load(models)
            wanted = {
                task.name: {int(k) for k in cohort.clients if k >= 0 and self.engine.partition.task_mask[k, o]}
                for o, task in enumerate(self.engine.tasks)
            }
            rows += self._score_all(variant, self.predict(cohort, stack, wanted), finite)
        return rows

    def evaluate_server(self, variant: str, server: Stack, finite: np.ndarray | None = None) -> list[Row]:
        """The server's blocks for every client; with common test sets each task is predicted once."""
        mask = self.engine.partition.task_mask
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
        parts, _ = take_parts(stack, seats, table, rows.client[n], rows.domain[n])
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
