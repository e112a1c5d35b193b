"""Tasks that one piece of the compiled program can serve.

Two tasks take the same static path where they are of one kind and modality, and their heads and arrays of equal shapes;
which blocks a stream touches is data. Such tasks form a *task group*: the program has one path per group, whatever the
number of tasks and domains.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from tap_jax.data.text import TaskArrays
from tap_jax.tasks import Stream, Task

FIELDS = ("images", "tokens", "labels", "answers")


@dataclasses.dataclass(frozen=True)
class TaskGroup:
    """Tasks of one static path; a row says by its number in `streams` of which stream it is."""

    tasks: tuple[Task, ...]

    @property
    def name(self) -> str:
        """Of its tasks."""
        return "+".join(task.name for task in self.tasks)

    @property
    def streams(self) -> tuple[Stream, ...]:
        """All streams of its tasks."""
        return tuple(stream for task in self.tasks for stream in task.streams)


def task_groups(tasks: Sequence[Task], arrays: Mapping[str, TaskArrays]) -> tuple[TaskGroup, ...]:
    """Sorts the tasks into groups; `arrays` holds a split of each, equal in shape to the other split's."""

    def signature(task: Task) -> tuple:
        shapes = tuple((field, array.shape[1:]) for field, array in fields(arrays[task.name]).items())
        return task.kind, task.modalities, task.classes, shapes

    found: dict[object, list[Task]] = {}
    for task in tasks:
        found.setdefault(signature(task), []).append(task)
    return tuple(TaskGroup(tuple(members)) for members in found.values())


def fields(split: TaskArrays) -> dict[str, np.ndarray]:
    """The arrays of a split that training reads."""
    return {field: getattr(split, field) for field in FIELDS if getattr(split, field) is not None}


def offsets(group: TaskGroup, arrays: Mapping[str, TaskArrays]) -> dict[str, int]:
    """Task name -> where its samples start in the group's arrays."""
    sizes = [len(arrays[task.name]) for task in group.tasks]
    return dict(zip((task.name for task in group.tasks), np.cumsum([0, *sizes[:-1]]).tolist(), strict=True))
