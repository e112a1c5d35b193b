"""Clients and the federation: who learns what (Sec. 3.1 and 5.1 of the paper)."""

import dataclasses
import difflib
import functools
from collections.abc import Iterable, Mapping

import numpy as np

from tap_jax.errors import UserError
from tap_jax.tasks import TASKS, Task, find_task


@dataclasses.dataclass(frozen=True)
class Client:
    """One participant.

    Attributes:
      name: shown in tables and logs.
      shares: task name -> fraction in (0, 1] of its group's part of that task's training set.
      group: the training sets are cut into as many equal parts as there are groups; a client draws from
        its own group's part, disjointly from the group's other clients.
      pattern: label of the row of the client table this client comes from (for per-pattern counts).
      samples: task name -> training samples, where the data name the clients; else empty.
    """

    name: str
    shares: Mapping[str, float]
    group: int = 0
    pattern: int = 0
    samples: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Federation:
    """Tasks and clients, and who owns what.

    Attributes:
      clients: K of them; a client's number is its place here.
      named: files and reports call the clients by their names, not by their numbers.

    Raises:
      UserError: no clients, a client without tasks, an unknown task, a share outside (0, 1], or shares of
        one task in one group that add up to more than 1.

    Example:
      >>> import tap_jax as tap
      >>> from tap_jax.federation import Client
      >>> clients = Client("clinic", {"vqa": 0.5}), Client("press", {"vqa": 0.5, "ag_news": 1.0})
      >>> federation = tap.Federation(clients)
      >>> [task.name for task in federation.tasks], federation.task_mask.tolist()
      (['ag_news', 'vqa'], [[False, True], [True, True]])
    """

    clients: tuple[Client, ...]
    named: bool = False

    def __post_init__(self) -> None:
        if self.named and len({client.name for client in self.clients}) < len(self.clients):
            raise UserError("federation.clients: two of one name; name each once")
        if not self.clients:
            raise UserError("federation.clients: empty; name at least one client")
        handed_out: dict[tuple[int, str], float] = {}
        for client in self.clients:
            if not client.shares:
                raise UserError(f"federation.clients: {client.name} has no task; give it at least one")
            for task, share in client.shares.items():
                find_task(task)
                if not 0 < share <= 1:
                    raise UserError(f"federation.clients: {client.name} takes {share} of {task}; use (0, 1]")
                total = handed_out.get((client.group, task), 0.0) + share
                if total > 1 + 1e-6:
                    raise UserError(
                        f"federation.rows: group {client.group} hands out {total:.2f} of {task}; keep it at most 1"
                    )
                handed_out[client.group, task] = total

    @functools.cached_property
    def tasks(self) -> tuple[Task, ...]:
        """Tasks that some client has, in the registry's order; O = len(tasks)."""
        names = {name for client in self.clients for name in client.shares}
        return tuple(task for task in TASKS.values() if task.name in names)

    @functools.cached_property
    def groups(self) -> int:
        """Number of groups; every group gets an equal part of each training set."""
        return 1 + max(client.group for client in self.clients)

    @property
    def task_mask(self) -> np.ndarray:
        """bool [K, O]: client k has task o."""
        return np.array([[task.name in client.shares for task in self.tasks] for client in self.clients])

    @functools.cached_property
    def labels(self) -> tuple[int | str, ...]:
        """What files and reports call each client."""
        return tuple(client.name if self.named else number for number, client in enumerate(self.clients))

    def number_of(self, label: int | str) -> int:
        """The number of the client of that name, or of that number.

        Raises:
          UserError: there is none; the message says which there are.
        """
        names = [client.name for client in self.clients]
        if str(label) in names:
            return names.index(str(label))
        if not self.named and str(label).isdecimal() and int(label) < len(names):
            return int(label)
        last = len(names) - 1
        known = (
            (", ".join(names) if last < 10 else f"{', '.join(names[:3])}, .. {names[-1]}")
            if self.named
            else f"numbers 0 to {last}"
        )
        near = [f"did you mean '{name}'? " for name in difflib.get_close_matches(str(label), names, n=1)]
        raise UserError(f"client: no client '{label}'; {''.join(near) if self.named else ''}the run has {known}")

    def tasks_of(self, client: int) -> tuple[Task, ...]:
        """The tasks of client number `client`, in the federation's order."""
        return tuple(task for task in self.tasks if task.name in self.clients[client].shares)


def client_table(rows: Iterable[Mapping[str, float]], *, groups: int = 1) -> Federation:
    """A federation of len(rows)·groups clients: each row of the table once per group.

    Args:
      rows: one mapping task name -> share per client pattern.
      groups: how often the table is repeated, each time on its own part of every training set.

    Example:
      >>> federation = client_table([{"ag_news": 0.5}, {"ag_news": 0.5, "vqa": 1.0}], groups=2)
      >>> [task.name for task in federation.tasks], len(federation.clients)
      (['ag_news', 'vqa'], 4)
    """
    rows = [dict(row) for row in rows]
    return Federation(
        tuple(
            Client(f"client{group * len(rows) + pattern}", shares, group, pattern)
            for group in range(groups)
            for pattern, shares in enumerate(rows)
        )
    )


_COMMON_ROWS = (
    {"ag_news": 0.33},
    {"ag_news": 0.33},
    {"caltech256": 0.5},
    {"vqa": 0.5},
    {"vqa": 0.5},
    {"mmlu": 1.0},
)
# The paper's ten patterns; its 30 clients are three groups of them (Sec. 5.1).
PAPER_ROWS: dict[str, tuple[Mapping[str, float], ...]] = {
    "flava": (
        {"tiny_imagenet": 1.0},
        *_COMMON_ROWS,
        {"cifar100": 1.0, "ag_news": 0.34},
        {"common_gen": 0.5, "fashion_mnist": 1.0},
        {"common_gen": 0.5, "caltech256": 0.5},
    ),
    "vilt": (
        {"fashion_mnist": 0.33},
        *_COMMON_ROWS,
        {"fashion_mnist": 0.33, "ag_news": 0.34},
        {"common_gen": 0.5, "fashion_mnist": 0.34},
        {"common_gen": 0.5, "caltech256": 0.5},
    ),
}
