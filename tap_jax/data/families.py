"""Streams that one piece of the compiled program can serve.

Two streams take the same static path when their tasks are of one kind and modality, their heads and their arrays of
equal shapes; which blocks they touch is data. Such streams form a *family*: the program has one path per family,
whatever the number of tasks and domains.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from tap_jax.data.text import TaskArrays
from tap_jax.tasks import Stream, Task

FIELDS = ("images", "tokens", "labels", "answers")


@dataclasses.dataclass(frozen=True)
class Family:
    """Tasks of one static path, and their streams in order; a stream's place in `streams` is its *variant*."""

    tasks: tuple[Task, ...]

    @property
    def name(self) -> str:
        """Of its tasks."""
        return "+".join(task.name for task in self.tasks)

    @property
    def streams(self) -> tuple[Stream, ...]:
        """All streams of its tasks."""
        return tuple(stream for task in self.tasks for stream in task.streams)


def families(tasks: Sequence[Task], arrays: Mapping[str, TaskArrays]) -> tuple[Family, ...]:
    """Sorts the tasks into families; `arrays` holds a split of each, equal in shape to the other split's."""

    def signature(task: Task):
        shapes = tuple((field, array.shape[1:]) for field, array in fields(arrays[task.name]).items())
        return task.kind, task.modalities, task.classes, shapes

    found: dict[object, list[Task]] = {}
    for task in tasks:
        found.setdefault(signature(task), []).append(task)
    return tuple(Family(tuple(members)) for members in found.values())


def fields(split: TaskArrays) -> dict[str, np.ndarray]:
    """The arrays of a split that training reads."""
    return {field: getattr(split, field) for field in FIELDS if getattr(split, field) is not None}


def offsets(family: Family, arrays: Mapping[str, TaskArrays]) -> dict[str, int]:
    """Task name -> where its samples start in the family's arrays."""
    sizes = [len(arrays[task.name]) for task in family.tasks]
    return dict(zip((task.name for task in family.tasks), np.cumsum([0, *sizes[:-1]]).tolist(), strict=True))
