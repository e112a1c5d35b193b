"""Every client's model on the test split of each of its tasks: batched, compiled, one program per task group.

Letters: D shards, E devices of a shard, N rows of a device, S samples of a row, A answer length.
"""

from collections.abc import Callable, Collection, Mapping, Sequence

import jax
import numpy as np

from tap_jax.blocks import Blocks, Params
from tap_jax.data.device_data import stored
from tap_jax.data.packing import RowShape, capacities, pack, padded
from tap_jax.data.sampling import row_shapes
from tap_jax.data.task_groups import TaskGroup, offsets
from tap_jax.data.text import TaskArrays, WordPiece
from tap_jax.engine.cohort import Cohort, client_batches
from tap_jax.engine.engine import Engine
from tap_jax.engine.parallel import ROWS, SHARED
from tap_jax.engine.programs import Program, abstract
from tap_jax.engine.settings import EngineSettings
from tap_jax.evaluation.metrics import TextScorer, accuracy
from tap_jax.evaluation.prediction import TestRows, predictor, scored
from tap_jax.evaluation.sampler import Sampler
from tap_jax.evaluation.scores import Row
from tap_jax.methods.base import State
from tap_jax.tasks import Task

PADDED_ROW = 50  # samples of a padded row


class Evaluator:
    """Scores models of clients.

    Args:
      engine: of the run.
      tests: task name -> test arrays.
      personal: per client, task name -> ids into its test set; None where all have the whole set.
      microbatch: samples of a padded row at most; a group's has no more than its tests need.

    Attributes:
      arrays: task group -> its tests on the device.
      starts: task name -> where its tests start in the group's arrays.
      shapes: task group -> shapes of its rows.
      sampler: keeps samples; None until `keep_samples` asks for it.
      tell: gets a few words before anything that may take long.
    """

    def __init__(
        self,
        engine: Engine,
        tests: Mapping[str, TaskArrays],
        *,
        tokenizer: WordPiece | None,
        scorer: TextScorer | None,
        personal: Sequence[Mapping[str, np.ndarray]] | None = None,
        microbatch: int = PADDED_ROW,
    ):
        self.engine, self.tests, self.personal = engine, tests, personal
        self.tokenizer, self.scorer = tokenizer, scorer
        self.arrays = engine.devices.put(stored(engine.task_groups, tests), SHARED)
        self.starts = {name: at for group in engine.task_groups for name, at in offsets(group, tests).items()}
        self.shapes = test_shapes(
            engine.task_groups,
            tests,
            engine.settings,
            image_tokens=engine.model.config.image_tokens,
            personal=personal,
            microbatch=microbatch,
        )
        self._programs = {
            group.name: Program(
                f"prediction of {group.name}",
                predictor(engine, group, self.shapes[group.name], tokenizer, scored),
                platform=engine.devices.platform,
            )
            for group in engine.task_groups
        }
        self.sampler: Sampler | None = None
        self.tell: Callable[[str], None] = lambda text: None

    def keep_samples(self, variant: str) -> Sampler:
        """From now on keeps samples of what this variant generates, in the sampler's `samples`."""
        self.sampler = Sampler(self, variant)
        return self.sampler

    def prepare(self, cohort: Cohort) -> None:
        """Starts compiling the programs of all task groups, for cohorts like this one, in the background."""
        for program, args in self.programs(cohort).values():
            program.prepare(*args)

    def programs(self, cohort: Cohort) -> dict[str, tuple[Program, tuple]]:
        """Task group -> its program and what it is given for cohorts like this one, as shapes."""
        engine, found = self.engine, {}
        for group in engine.task_groups:
            rows = self._rows(cohort, group, {})
            found[group.name] = (
                self._programs[group.name],
                (
                    *abstract((engine.frozen, self.arrays[group.name]), engine.shared),
                    cohort.abstract_params(engine.finished.like),
                    abstract(cohort.layout, engine.by_client),
                    abstract(rows, engine.by_row),
                ),
            )
        return found

    def ids(self, client: int, task: str) -> np.ndarray:
        """int64 [.], the client's test samples of a task; none where it has no test set of its own there."""
        if self.personal is None:
            return np.arange(len(self.tests[task]))
        return self.personal[client].get(task, np.zeros(0, np.int64))

    def label(self, client: int) -> int | str:
        """What results call a client."""
        return self.engine.labels[client]

    def predict(
        self, cohort: Cohort, params: Params, wanted: Mapping[str, set[int]], name: str = "the model"
    ) -> dict[tuple[int, str], np.ndarray]:
        """Predictions of the cohort's clients.

        Args:
          wanted: task name -> clients to predict for.
          name: what `tell` calls the models.

        Returns:
          (client, task) -> labels int32 [n]; mean squared errors float32 [n]; or generated ids int32 [n, A-1].
        """
        pending = []
        for group in self.engine.task_groups:
            rows = self._rows(cohort, group, wanted)
            if any(one.count.any() for one in rows):
                clients = set().union(*(wanted.get(task.name, ()) for task in group.tasks))
                tasks = ", ".join(task.name for task in group.tasks if wanted.get(task.name))
                self.tell(f"{name}: predictions for {tasks}, {self._clients(clients & set(cohort.clients.tolist()))}")
                values = self._programs[group.name](
                    self.engine.frozen,
                    self.arrays[group.name],
                    params,
                    cohort.layout,
                    self.engine.devices.put(rows, ROWS),
                )
                if not self.engine.devices.platform.accelerated:
                    # A CPU would run all task groups side by side, each with its memory.
                    jax.block_until_ready(values)
                pending.append((group, rows, values))
        results = {}
        for group, rows, values in pending:
            values = self.engine.devices.fetch(values)
            for task in group.tasks:
                streams = [n for n, stream in enumerate(group.streams) if stream.task == task]
                for position, client in enumerate(cohort.clients):
                    if client in wanted.get(task.name, ()):
                        pieces = [
                            _of(one, found, position, cohort, streams) for one, found in zip(rows, values, strict=True)
                        ]
                        ids, found = map(np.concatenate, zip(*pieces, strict=True))
                        at = np.zeros(len(self.tests[task.name]), int)
                        at[ids - self.starts[task.name]] = np.arange(len(ids))
                        results[int(client), task.name] = found[at[self.ids(int(client), task.name)]]
        return results

    def _rows(self, cohort: Cohort, group: TaskGroup, wanted: Mapping[str, set[int]]) -> tuple[TestRows, ...]:
        shapes, devices = self.shapes[group.name], self.engine.devices.per_shard
        tables = tuple(
            TestRows.empty(cohort.clients.size // cohort.positions, devices, capacity, shape)
            for capacity, shape in zip(self._capacity(cohort, group), shapes, strict=True)
        )
        for shard, clients in enumerate(cohort.clients.reshape(-1, cohort.positions)):
            added = [0] * len(shapes)
            for position, client in enumerate(clients):
                for number, stream in enumerate(group.streams):
                    if client not in wanted.get(stream.task.name, ()):
                        continue
                    test, ids = self.tests[stream.task.name], self.ids(int(client), stream.task.name)
                    ids = ids[test.domains[ids] == stream.task.domains.index(stream.domain)]
                    for row in pack(shapes, len(ids), test.text_lengths[ids], np.zeros(len(ids), int)):
                        mine = self.starts[stream.task.name] + ids[row.samples]
                        tables[row.size].add(shard, added[row.size] % devices, position, number, mine, row.text_at)
                        added[row.size] += 1
        return tables

    def _capacity(self, cohort: Cohort, group: TaskGroup) -> tuple[int, ...]:
        """Rows of each shape that a device needs at most, for any cohort, so that one program serves all."""
        mask, tests = self.engine.partition.task_mask, self.tests
        sizes = {
            stream.name: int((tests[stream.task.name].domains == stream.task.domains.index(stream.domain)).sum())
            for stream in group.streams
        }
        clients = [[sizes[s.name] for s in group.streams if mine[self.engine.tasks.index(s.task)]] for mine in mask]
        found = capacities(
            clients,
            self.shapes[group.name],
            positions=cohort.positions,
            batch=sum(sizes.values()),
            multiple=self.engine.devices.per_shard,
        )
        return tuple(rows // self.engine.devices.per_shard for rows in found)

    def score(self, variant: str, client: int, task: Task, predicted: np.ndarray, diverged: bool = False) -> list[Row]:
        """Result rows of one client and task; a value is None where the model diverged, or is itself no number."""
        ids, test = self.ids(client, task.name), self.tests[task.name]
        if task.kind.endswith("classification"):
            values = {"accuracy": accuracy(predicted, test.labels[ids])}
        elif task.kind == "image_generation":
            values = {"mse": float(np.mean(predicted, dtype=np.float64))}
        else:
            texts = self.tokenizer.decode(predicted)
            self.tell(f"{variant}: scores of {len(texts)} texts of {task.name}, client {self.label(client)}")
            scores = self.scorer.score(texts, [test.references[i] for i in ids])
            values = {name: float(np.mean(value)) for name, value in scores.items()}
        return [
            Row(
                variant=variant,
                client=self.label(client),
                task=task.name,
                metric=metric,
                value=None if diverged or not np.isfinite(value) else value,
            )
            for metric, value in values.items()
        ]

    def evaluate(self, variant: str, cohort: Cohort, models: Mapping[int, Blocks]) -> list[Row]:
        """The own models of a cohort's clients: client number -> blocks.

        A task gets no value where the model holds a value that is no number in a block that the task uses: an argmax
        over NaN would be one. Training whose loss is no number leaves such a model.
        """
        mask = self.engine.partition.task_mask
        diverged = {(client, name) for client, mine in models.items() for name in self._broken(mine)}
        wanted = {
            task.name: {k for k in models if mask[k, o] and len(self.ids(k, task.name))}
            for o, task in enumerate(self.engine.tasks)
        }
        params = cohort.load(models, like=self.engine.finished.like)
        if self.sampler:
            self.sampler.images(variant, cohort, params)
        return self._score_all(variant, self.predict(cohort, params, wanted, variant), diverged)

    def evaluate_server(self, variant: str, state: State) -> list[Row]:
        """The server's blocks for every client; with common test sets each task is predicted once.

        An update that is not finite never reaches them. So a task gets no value where clients trained it and none of
        them was ever heard.
        """
        mask, rows = self.engine.partition.task_mask, []
        lost = mask & state.seen.any(0) & ~(state.seen & state.heard).any(0)
        diverged = {(int(k), self.engine.tasks[o].name) for k, o in np.argwhere(lost)}
        owners = {task.name: np.flatnonzero(mask[:, o]) for o, task in enumerate(self.engine.tasks)}
        wanted = {
            name: {int(k) for k in (found if self.personal else found[:1]) if len(self.ids(int(k), name))}
            for name, found in owners.items()
        }
        for cohort in client_batches(self.engine, 0):
            present = {name: clients & {int(k) for k in cohort.clients} for name, clients in wanted.items()}
            if any(present.values()):
                params = cohort.broadcast(state.server)
                if self.sampler:
                    self.sampler.images(variant, cohort, params)
                rows += self._score_all(variant, self.predict(cohort, params, present, variant), diverged)
        if self.personal is None:
            rows = [Row({**row, "client": self.label(k)}) for row in rows for k in owners[row["task"]]]
        return rows

    def _clients(self, numbers: Collection[int]) -> str:
        """In words: "client 3", "clients 3, 13", "30 clients"."""
        if len(numbers) > 4:
            return f"{len(numbers)} clients"
        return f"client{'s' * (len(numbers) > 1)} {', '.join(str(self.label(k)) for k in sorted(numbers))}"

    def _broken(self, mine: Blocks) -> list[str]:
        """Names of the tasks that use a block of the client's which holds a value that is no number."""
        bad = {
            name for name, tree in mine.items() if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))
        }
        model = self.engine.model
        return [task.name for task in self.engine.tasks if bad & {b for s in task.streams for b in model.blocks_of(s)}]

    def _score_all(self, variant: str, predicted: Mapping, diverged: Collection[tuple[int, str]]) -> list[Row]:
        tasks, rows = {task.name: task for task in self.engine.tasks}, []
        for (client, name), values in predicted.items():
            rows += self.score(variant, client, tasks[name], values, (client, name) in diverged)
            if self.sampler:
                self.sampler.texts(variant, client, tasks[name], values)
        return rows


def test_shapes(
    task_groups: Sequence[TaskGroup],
    tests: Mapping[str, TaskArrays],
    settings: EngineSettings,
    *,
    image_tokens: int,
    personal: Sequence[Mapping[str, np.ndarray]] | None = None,
    microbatch: int = PADDED_ROW,
) -> dict[str, tuple[RowShape, ...]]:
    """Task group -> shapes of its rows; packed ones are larger than in training, as no gradient needs their tokens.

    Args:
      personal, microbatch: see `Evaluator`.
    """
    if not settings.packed:
        return {group.name: padded(_row_size(group, tests, personal, microbatch)) for group in task_groups}
    return row_shapes(
        task_groups,
        tests,
        packed=True,
        microbatch=4 * settings.microbatch,
        batch=max(map(len, tests.values())),
        image_tokens=image_tokens,
        answers=False,
    )


def _row_size(
    group: TaskGroup, tests: Mapping[str, TaskArrays], personal: Sequence[Mapping[str, np.ndarray]] | None, most: int
) -> int:
    """As few rows as `most` samples in each allow, and no more samples in a row than that takes.

    All samples of a row are computed, real or not.
    """
    largest = 1
    for task in group.tasks:
        domains = tests[task.name].domains
        parts = [domains] if personal is None else [domains[mine[task.name]] for mine in personal if task.name in mine]
        largest = max(largest, *(int(np.bincount(part, minlength=1).max()) for part in parts))
    return -(-largest // -(-largest // most))


def _of(rows: TestRows, values: np.ndarray, position: int, cohort: Cohort, streams: list[int]):
    """A client's samples in rows of one shape: (ids int [n], what was found of each [n, ...])."""
    shard, local = divmod(position, cohort.positions)
    real = np.arange(rows.client.shape[-1]) < rows.count[shard][:, None]
    mine = real & (rows.client[shard] == local) & np.isin(rows.stream[shard], streams)
    ids = rows.ids[shard][mine].reshape(-1)
    found = values[shard][mine].reshape(len(ids), *values.shape[4:])
    return ids[ids >= 0], found[ids >= 0]
