"""A configuration without its data: model, clients and who owns which block, from shapes alone.

Nothing is allocated, no data are read: the paper's sizes are outlined in seconds on any machine.
"""

import dataclasses

import numpy as np

from tap_jax import assembly, blocks
from tap_jax.assembly import Sections
from tap_jax.blocks import Partition
from tap_jax.config import ConfigDict, validate
from tap_jax.federation import Federation
from tap_jax.models.accounting import table7
from tap_jax.models.server_model import ServerModel
from tap_jax.platforms import Platform
from tap_jax.tasks import Task


@dataclasses.dataclass(frozen=True)
class Outline:
    """What a configuration amounts to before any data are read.

    Attributes:
      sections: what the configuration was cut into.
      patterns: per row of the client table, the numbers of its clients; all of them own the same blocks.
    """

    sections: Sections
    federation: Federation
    model: ServerModel
    partition: Partition
    patterns: tuple[tuple[int, ...], ...]

    def tasks_of(self, client: int) -> tuple[Task, ...]:
        """The client's tasks, with the classes in use."""
        mine = self.federation.clients[client].shares
        return tuple(task for task in self.model.tasks if task.name in mine)

    def table7(self) -> dict[str, float]:
        """Table 7's parameters; see `tap_jax.models.accounting.table7`."""
        return table7(self.model, [self.tasks_of(k) for k in range(len(self.federation.clients))])


def outline(config: ConfigDict, target: Platform | None = None) -> Outline:
    """Everything of `experiment.build` that needs no data but, where these name the clients, their names.

    Args:
      target: the platform of devices that are not here; default: of this process's.

    Raises:
      UserError: whatever is wrong with the configuration.
    """
    validate(config)
    sections = assembly.cut(assembly.with_found(config), target, attention="einsum")
    federation, model = sections.federation, ServerModel(sections.model, sections.tasks)
    patterns: dict[int, list[int]] = {}
    for number, client in enumerate(federation.clients):
        patterns.setdefault(client.pattern, []).append(number)
    partition = model.partition(federation.task_mask)
    return Outline(sections, federation, model, partition, tuple(map(tuple, patterns.values())))


def block_sizes(partition: Partition, like: blocks.Blocks) -> np.ndarray:
    """Parameters of every block [R]; a private one has as many as its twin."""
    return np.array([blocks.count(like[name.removeprefix(blocks.PRIVATE)]) for name in partition.names])
