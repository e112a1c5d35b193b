"""What a local step costs in floating-point operations.

Letters: B samples of a stream in one client's minibatch.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp

from tap_jax import assembly
from tap_jax.data.minibatches import Batch
from tap_jax.models.accounting import shapes
from tap_jax.models.server_model import ServerModel
from tap_jax.planning.flops import Flops, count
from tap_jax.tasks import Task

# Field of a sample -> its shape, see `data.task_groups.FIELDS`.
Widths = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Cost:
    """Operations of one gradient of a task: `once` per minibatch (work on weights alone), and `per_sample`."""

    once: Flops
    per_sample: Flops

    def of(self, samples: int) -> Flops:
        """Of a minibatch with so many samples of one of the task's streams."""
        return self.once + self.per_sample * samples if samples else Flops()


def longest(model: ServerModel, task: Task) -> Widths:
    """Of a sample with the longest text and answer that the model takes."""
    widths: dict[str, tuple[int, ...]] = {}
    if "image" in task.modalities:
        widths["images"] = (64, 64, 3)
    if "text" in task.modalities:
        widths["tokens"] = (model.config.max_text,)
    if task.kind == "text_generation":
        widths["answers"] = (model.config.max_answer,)
    if task.classes:
        widths["labels"] = ()
    return widths


def task_flops(model: ServerModel, widths: Mapping[str, Widths], *, samples: int = 1) -> dict[str, Flops]:
    """Task name -> the operations of a gradient of its loss on B `samples`.

    Args:
      widths: task name -> the shapes of its samples. Padded positions of a text are counted, as they are computed.
    """
    frozen, blocks = shapes(model)
    # Every implementation of attention does the same products; this one shows them.
    model = ServerModel(dataclasses.replace(model.config, attention="einsum"), model.tasks)
    sample_loss = assembly.sample_loss(model)
    known: dict[object, Flops] = {}
    found = {}
    for task in (task for task in model.tasks if task.name in widths):
        like = tuple(sorted(widths[task.name].items()))
        key = (task.kind, task.modalities, task.classes, like)
        if key not in known:
            parts = jax.eval_shape(functools.partial(model.collect, stream=task.streams[0]), blocks)
            batch = {
                name: jax.ShapeDtypeStruct((samples, *axes), jnp.float32 if name == "images" else jnp.int32)
                for name, axes in like
            }

            def loss(parts, frozen, batch, task=task):
                return sample_loss(frozen, parts, task, batch, None)[2].sum()

            known[key] = count(loss, parts, frozen, batch)
        found[task.name] = known[key]
    return found


def task_costs(model: ServerModel, widths: Mapping[str, Widths]) -> dict[str, Cost]:
    """Task name -> `Cost`; arguments as of `task_flops`."""
    one, two = (task_flops(model, widths, samples=samples) for samples in (1, 2))
    return {name: Cost(one[name] * 2 + two[name] * -1, two[name] + one[name] * -1) for name in one}


def steps_cost(costs: Mapping[str, Cost], steps: Iterable[Sequence[Batch]]) -> Flops:
    """Of a client's local steps, one gradient each."""
    return sum((costs[batch.stream.task.name].of(len(batch)) for step in steps for batch in step), Flops())
