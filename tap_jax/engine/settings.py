"""How local training runs: what a configuration says of it, with the platform's defaults filled in."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from tap_jax.engine.local_training import TrainingSettings
from tap_jax.engine.privacy import Privacy
from tap_jax.engine.screening import Screening


class MeshSettings(NamedTuple):
    """The mesh of devices that is asked for: the arguments of `parallel.devices`, which says what they mean."""

    clients: int
    data: int
    parallel: str


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """How local training runs.

    Attributes:
      rounds: T.
      cohort_size, clients_at_once: clients in a round, and at once in phases over all clients.
      batch: samples per iteration. local_steps: τ. post_steps: P.
      microbatch: samples of a row; this and `clients_at_once` are 0 until `device_sizes.sized` has chosen them.
      packed: a row's texts share sequences, see `data.packing`.
      generator: of dropout masks, see `objective.Objective`.
      training: static choices of the program.
      persist: a client goes on with its optimizer states instead of starting every local training afresh.
      longest: most steps that a local training takes; the plans of all have room for so many, so that one program
        serves them.
      in_pieces: Stage 2 trains by some steps at a time, between which its optimizer states are kept.
      rate: round -> learning rate. post_rate: learning rate after the last round.
      aggregation: "samples" or "uniform".
      scope: of a replacement, see `Partition.replaceable`.
      seed: of every draw.
      screening: of the clients' updates. privacy: of the aggregate; None: it is exact.
      mesh: the devices that are asked for.
      host_bytes: what personal blocks may take in memory on the host before they go to disk.
      window: rounds whose personal trainings are played together (`engine.windows`); 1: each round by itself.
    """

    rounds: int
    cohort_size: int
    clients_at_once: int
    batch: int
    local_steps: int
    post_steps: int
    microbatch: int
    packed: bool
    training: TrainingSettings
    persist: bool
    rate: Callable[[int], float]
    post_rate: float
    longest: int
    aggregation: str
    scope: str
    seed: int
    screening: Screening
    privacy: Privacy | None
    window: int
    in_pieces: bool
    generator: str
    mesh: MeshSettings
    host_bytes: int

    def window_clients(self, clients: int) -> int:
        """How many of a federation's clients a window's personal training takes at once, at most."""
        return min(clients, self.window * self.cohort_size)
