"""Keeps samples of what one variant generates, while it is evaluated."""

from typing import TYPE_CHECKING

import jax
import numpy as np

from tap_jax.blocks import Params
from tap_jax.data.packing import padded
from tap_jax.data.task_groups import TaskGroup
from tap_jax.engine.cohort import Cohort
from tap_jax.engine.parallel import ROWS
from tap_jax.evaluation.prediction import TestRows, image, predictor
from tap_jax.evaluation.samples import EXAMPLES, OWNERS, ImageSample, Sample, TextSample, to_uint8
from tap_jax.platforms import compiler_options
from tap_jax.tasks import Stream, Task

if TYPE_CHECKING:
    from tap_jax.evaluation.evaluate import Evaluator


class Sampler:
    """Samples of the first owners of each generative task; texts are those that were scored, images made anew.

    Args:
      evaluator: `tap_jax.evaluation.evaluate.Evaluator`.
      variant: whose samples to keep.

    Attributes:
      samples: those kept so far.
    """

    def __init__(self, evaluator: "Evaluator", variant: str):
        self.evaluator, self.variant = evaluator, variant
        self.engine, self.tests = evaluator.engine, evaluator.tests
        self.samples: list[Sample] = []
        self._painters = {
            group: jax.jit(
                predictor(self.engine, group, padded(1), None, image), compiler_options=compiler_options(once=True)
            )
            for group in self.engine.task_groups
            if group.tasks[0].kind == "image_generation"
        }

    def texts(self, variant: str, client: int, task: Task, predicted: np.ndarray) -> None:
        """Sees generated ids int [n, A-1] of a client's test samples."""
        if variant == self.variant and task.kind == "text_generation" and client in self._first_owners(task):
            test, decode = self.tests[task.name], self.evaluator.tokenizer.decode
            for example, ids in zip(self.evaluator.ids(client, task.name)[:EXAMPLES].tolist(), predicted, strict=False):
                given = "" if test.tokens is None else decode(test.tokens[example][None])[0]
                (generated,), references = decode(ids[None]), tuple(test.references[example])
                label = self.evaluator.label(client)
                self.samples.append(TextSample(variant, label, task.name, example, given, generated, references))

    def images(self, variant: str, cohort: Cohort, params: Params) -> None:
        """Sees the models of a cohort before they are scored."""
        for group, painter in self._painters.items() if variant == self.variant else ():
            rows, kept = self._rows(cohort, group)
            if kept:
                self.evaluator.tell(f"{variant}: images for samples/")
                painted = painter(
                    self.engine.frozen,
                    self.evaluator.arrays[group.name],
                    params,
                    cohort.layout,
                    self.engine.devices.put((rows,), ROWS),
                )
                painted = to_uint8(self.engine.devices.fetch(painted[0]))
                for shard, row, client, task, example in kept:
                    target = self.tests[task].images[example]
                    label, drawn = self.evaluator.label(client), painted[shard, 0, row, 0]
                    self.samples.append(ImageSample(variant, label, task, example, target, drawn))

    def _rows(self, cohort: Cohort, group: TaskGroup) -> tuple[TestRows, list[tuple[int, int, int, str, int]]]:
        """One row for each image to keep, on the first device of its shard; (shard, row, client, task, example)."""
        clients = cohort.clients.reshape(-1, cohort.positions)
        capacity = OWNERS * EXAMPLES * len(group.tasks)
        rows, kept = TestRows.empty(len(clients), self.engine.devices.per_shard, capacity, *padded(1)), []
        for task in group.tasks:
            for client in self._first_owners(task):
                for shard, position in np.argwhere(clients == client):
                    for example in self.evaluator.ids(client, task.name)[:EXAMPLES]:
                        domain = task.domains[self.tests[task.name].domains[example]]
                        stream = group.streams.index(Stream(task, domain))
                        ids = np.array([self.evaluator.starts[task.name] + example])
                        row = rows.add(shard, 0, position, stream, ids)
                        kept.append((int(shard), row, client, task.name, int(example)))
        return rows, kept

    def _first_owners(self, task: Task) -> list[int]:
        mask = self.engine.partition.task_mask
        return np.flatnonzero(mask[:, self.engine.tasks.index(task)])[:OWNERS].tolist()
