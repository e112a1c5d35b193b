"""Every client's model on the test split of each of its tasks: batched, compiled, one program per family.

Letters: D shards, E devices of a shard, N rows of a device, s samples of a row, A answer length.
"""

from collections.abc import Mapping, Sequence

import jax
import numpy as np

from tap_jax.blocks import Blocks, Stack
from tap_jax.data.families import Family, offsets
from tap_jax.data.store import stored
from tap_jax.data.text import TaskArrays, WordPiece
from tap_jax.engine.cohort import Cohort
from tap_jax.engine.engine import Engine
from tap_jax.engine.parallel import ROWS, SHARED
from tap_jax.engine.programs import Program, abstract
from tap_jax.evaluation.metrics import TextScorer, accuracy
from tap_jax.evaluation.prediction import TestRows, predictor, scored
from tap_jax.evaluation.sampler import Sampler
from tap_jax.evaluation.scores import Row
from tap_jax.federation import Task


class Evaluator:
    """Scores models of clients.

    Args:
      engine: of the run.
      tests: task name -> test arrays.
      personal: per client, task name -> ids into its test set; None where all have the whole set.
      microbatch: s.

    Attributes:
      arrays: family name -> its tests on the device.
      starts: task name -> where its tests start in the family's arrays.
      sampler: keeps samples; None until `keep_samples` asks for it.
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
        self.arrays = engine.devices.put(stored(engine.families, tests), SHARED)
        self.starts = {name: at for family in engine.families for name, at in offsets(family, tests).items()}
        self._programs = {
            family.name: Program(predictor(engine, family, tokenizer, scored), platform=engine.devices.platform)
            for family in engine.families
        }
        self.sampler: Sampler | None = None

    def keep_samples(self, variant: str) -> None:
        """From now on keeps samples of what this variant generates, in `sampler.samples`."""
        self.sampler = Sampler(self, variant)

    def prepare(self, cohort: Cohort) -> None:
        """Starts compiling the programs of all families, for cohorts like this one, in the background."""
        for program, args in self.programs(cohort).values():
            program.prepare(*args)

    def programs(self, cohort: Cohort) -> dict[str, tuple[Program, tuple]]:
        """Family name -> its program and what it is given for cohorts like this one, as shapes."""
        engine, found = self.engine, {}
        for family in engine.families:
            rows = self._rows(cohort, family, {})
            found[family.name] = (
                self._programs[family.name],
                (
                    *abstract((engine.frozen, self.arrays[family.name]), engine.shared),
                    cohort.abstract_stack(engine.finished.like),
                    abstract(cohort.seats, engine.by_client),
                    abstract(rows, engine.by_row),
                ),
            )
        return found

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
                    self.arrays[family.name],
                    stack,
                    cohort.seats,
                    self.engine.devices.put(rows, ROWS),
                )
                pending.append((family, rows, values))
        results = {}
        for family, rows, values in pending:
            values = self.engine.devices.fetch(values)
            for task in family.tasks:
                variants = [v for v, stream in enumerate(family.streams) if stream.task == task]
                for position, client in enumerate(cohort.clients):
                    if client not in wanted.get(task.name, ()):
                        continue
                    shard, local = divmod(position, cohort.positions)
                    real = np.arange(rows.client.shape[-1]) < rows.count[shard][:, None]
                    mine = real & (rows.client[shard] == local) & np.isin(rows.variant[shard], variants)
                    ids = rows.ids[shard][mine].reshape(-1)
                    found = values[shard][mine].reshape(len(ids), *values.shape[4:])
                    at = np.zeros(len(self.tests[task.name]), int)
                    at[ids[ids >= 0] - self.starts[task.name]] = np.flatnonzero(ids >= 0)
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
                        mine = self.starts[stream.task.name] + ids[self.tests[stream.task.name].domains[ids] == domain]
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
        most, parts = int(np.sort(needed)[::-1][: cohort.positions].sum()), self.engine.devices.parts
        table = TestRows.empty(len(shards), parts, max(1, -(-most // parts)), self.microbatch)
        for shard, rows in enumerate(shards):
            for n, row in enumerate(rows):
                table.add(shard, n % parts, *row)
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
        stack = cohort.load(models, like=self.engine.finished.like)
        if self.sampler:
            self.sampler.images(variant, cohort, stack)
        return self._score_all(variant, self.predict(cohort, stack, wanted), finite)

    def evaluate_server(
        self, variant: str, server: Stack, finite: np.ndarray | None = None, seen: np.ndarray | None = None
    ) -> list[Row]:
        """The server's blocks for every client; with common test sets each task is predicted once.

        Args:
          finite: bool [K, O], of the clients' training. A task counts as diverged where it did for all its owners that
            took part: as long as one was heard, the server's blocks are that one's.
          seen: bool [K, O], who took part with what; default: everybody.
        """
        mask = self.engine.partition.task_mask
        if finite is not None:
            trained = mask if seen is None else mask & seen
            finite = mask & ((finite & trained).any(0) | ~trained.any(0))
        rows = []
        owners = {task.name: np.flatnonzero(mask[:, o]) for o, task in enumerate(self.engine.tasks)}
        wanted = {name: {int(k) for k in (found if self.personal else found[:1])} for name, found in owners.items()}
        for cohort in self.engine.passes(0):
            present = {name: clients & {int(k) for k in cohort.clients} for name, clients in wanted.items()}
            if any(present.values()):
                stack = cohort.broadcast(server)
                if self.sampler:
                    self.sampler.images(variant, cohort, stack)
                rows += self._score_all(variant, self.predict(cohort, stack, present), finite)
        if self.personal is None:
            rows = [Row({**row, "client": int(k)}) for row in rows for k in owners[row["task"]]]
        return rows

    def _score_all(self, variant, predicted, finite) -> list[Row]:
        rows = []
        for (client, name), values in predicted.items():
            o = [task.name for task in self.engine.tasks].index(name)
            healthy = True if finite is None else bool(finite[client, o])
            rows += self.score(variant, client, self.engine.tasks[o], values, healthy)
            if self.sampler:
                self.sampler.texts(variant, client, self.engine.tasks[o], values)
        return rows
