"""How large rows and batches of clients may be, and what the backward pass is given: the defaults of a device.

Where `engine.microbatch` and `engine.clients_at_once` are 0 and `engine.remat` is "auto", `sized` fills them in: of an
accelerator what an estimate of memory and time finds best. The estimate counts arrays from shapes; nothing is
compiled. `tap-jax describe --target` shows what the compiler says of the same program.

Letters: M tokens of a row, D width, F inner width of feed-forward networks.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator

import jax

from tap_jax import assembly, blocks
from tap_jax.assembly import Sections
from tap_jax.data.packing import SEQUENCE
from tap_jax.engine.memory_plan import MemoryPlan, memory_plan
from tap_jax.engine.settings import EngineSettings
from tap_jax.models.accounting import shapes
from tap_jax.models.layers import ModelConfig
from tap_jax.models.server_model import ServerModel, to_compute_dtype
from tap_jax.tasks import Task

# Part of a device's memory that the estimate may fill: the compiler's own padding and fragmentation take the rest.
FILLED = 0.85
# What a compiler keeps, at most, over what `row_bytes` counts of the largest row. Seen with all tasks of FLAVA at base
# size (benchmarks.md): 0.7 to 0.8 on GPUs, 1.8 on v5e, whose smaller rows keep more than their count, up to 3.4.
RESIDUALS = {"gpu": 0.9, "tpu": 1.8}
DATA = 2**31  # bytes of training and test data on a device, where nothing bounds them: sets as the hub has them
ENOUGH = 512  # tokens at which a row keeps matrix units half busy
KEPT, LAYER = "none", "layer"  # values of engine.remat
_SLOWER = {KEPT: 1.0, LAYER: 1.25}  # forward passes are a third of the work, and frozen weights have more


@dataclasses.dataclass(frozen=True)
class Sizes:
    """One choice.

    Attributes:
      microbatch, clients, remat: values of `engine.microbatch`, `engine.clients_at_once` and `engine.remat`.
      bytes: of memory on a device at most, by the estimate.
      time: relative, by the estimate; less is faster.
    """

    microbatch: int
    clients: int
    remat: str
    bytes: int
    time: float

    @property
    def fields(self) -> dict[str, int | str]:
        """As fields of the configuration."""
        return {
            "engine.microbatch": self.microbatch,
            "engine.clients_at_once": self.clients,
            "engine.remat": self.remat,
        }

    @property
    def flags(self) -> str:
        """As arguments of the command line."""
        return " ".join(f"--config.{field}={value}" for field, value in self.fields.items())


def sized(sections: Sections, devices: int = 1) -> Sections:
    """The sections with the defaults of a device where they are `open`.

    On CPUs rows of one sample (wide rows lose to caches, and padding is work) and batches of the cohort's size, so that
    one program serves everything. On accelerators what `choices` finds; where their memory is not known, rows of 32
    samples or of as many tokens, all clients in one batch.

    Args:
      devices: how many share out the clients.
    """
    if not sections.open:
        return sections
    settings, people = sections.engine, len(sections.federation.clients)
    remat = sections.model.remat
    if not sections.platform.accelerated:
        microbatch, clients = settings.microbatch or 1, settings.clients_at_once or min(people, settings.cohort_size)
    elif sections.platform.memory is None:
        microbatch, clients = settings.microbatch or min(32, settings.batch), settings.clients_at_once or people
    else:
        found = next(iter(choices(sections, devices)), None)
        if found is None:  # nothing fits by the estimate: the smallest, and the compiler has the last word
            found = min(_all(sections, devices), key=lambda sizes: sizes.bytes)
        microbatch, clients, remat = found.microbatch, found.clients, found.remat == LAYER
    engine = dataclasses.replace(settings, microbatch=microbatch, clients_at_once=clients)
    model = dataclasses.replace(sections.model, remat=remat)
    return dataclasses.replace(sections, engine=engine, model=model, open=frozenset())


def choices(sections: Sections, devices: int = 1) -> list[Sizes]:
    """What fits by the estimate, the fastest first. Settings that the configuration names are kept.

    Rows follow each other, whosever they are, so more clients at once save no time on one shard. As many as in a round
    come first there: the program of the rounds then serves after the last one, too. Where there are more shards, many
    clients are shared out more evenly than few.
    """
    settings, most = sections.engine, FILLED * (sections.platform.memory or 0)
    alone, cohort = shards_of(settings, devices) == 1, min(settings.cohort_size, len(sections.federation.clients))
    fits = [sizes for sizes in _all(sections, devices) if sizes.bytes <= most]
    return sorted(fits, key=lambda sizes: (sizes.time, alone and sizes.clients != cohort, -sizes.clients, sizes.bytes))


def _all(sections: Sections, devices: int) -> Iterator[Sizes]:
    settings, people = sections.engine, len(sections.federation.clients)
    rows, batches, words = [settings.microbatch], [settings.clients_at_once], [LAYER if sections.model.remat else KEPT]
    if "microbatch" in sections.open:
        rows = [s for s in (32, 16, 8, 4, 2, 1) if s <= settings.batch]
    if "clients_at_once" in sections.open:
        shards = shards_of(settings, devices)
        halves = (shards * math.ceil(people / (shards * 2**n)) for n in range(12))
        batches = sorted({min(people, count) for count in (settings.cohort_size, *halves)})
    if "remat" in sections.open:
        words = [KEPT, LAYER]
    estimate = Estimate(sections, devices)
    for clients in batches:
        for microbatch in rows:
            for remat in words:
                yield estimate(microbatch, clients, remat)


class Estimate:
    """Bytes and relative time of choices, for one configuration on devices of its platform.

    What lies on a device: frozen weights, data, the blocks of the clients that train, their gradients, AdamW's moments
    and a teacher (`engine.memory_plan`); the residuals of one row (`row_bytes`), which the backward pass reads; and as
    much again of the row's blocks and their gradients.
    """

    def __init__(self, sections: Sections, devices: int = 1):
        self.sections, self.devices = sections, devices
        self.model = ServerModel(dataclasses.replace(sections.model, attention="einsum"), sections.tasks)
        self.fixed = functools.cache(self._fixed)

    def __call__(self, microbatch: int, clients: int, remat: str) -> Sizes:
        """One choice."""
        c, settings, people = self.model.config, self.sections.engine, len(self.sections.federation.clients)
        rows = [row_tokens(c, task, microbatch, settings.packed) for task in self.model.tasks]
        row = max(row_bytes(c, tokens, remat) for tokens in rows)
        plan = self.fixed(clients)
        memory = max(plan.on_device(phase) for phase in plan.phases) + int(RESIDUALS[self.sections.platform.kind] * row)
        tokens = max(map(sum, rows))
        shards = shards_of(settings, self.devices)
        turns = -(-people // clients) * -(-clients // shards) * shards / people
        rounds = 2 * settings.rounds * settings.local_steps * min(settings.cohort_size, people)
        last = sum(self.sections.post_periods) * people * settings.post_steps * turns
        busy = tokens / (tokens + ENOUGH)
        return Sizes(microbatch, clients, remat, memory, (rounds + last) * _SLOWER[remat] / busy)

    def _fixed(self, clients: int) -> MemoryPlan:
        settings = dataclasses.replace(self.sections.engine, clients_at_once=clients, host_bytes=0)
        partition = self.model.partition(self.sections.federation.task_mask)
        frozen, trainable = shapes(self.model)
        kept = jax.eval_shape(lambda tree: to_compute_dtype(tree, self.model.config.dtype), frozen)
        shards = shards_of(settings, self.devices)
        return memory_plan(
            self.model,
            partition.with_private(self.model.adapter_blocks),
            assembly.method_of(self.sections, self.model),
            settings,
            like=trainable,
            frozen=blocks.size_bytes(kept),
            data=DATA,
            made=True,
            after=True,
            shards=shards,
            per_shard=self.devices // shards,
        )


def shards_of(settings: EngineSettings, devices: int) -> int:
    """How many shards `parallel.devices` makes of so many devices."""
    clients, data, _ = settings.mesh
    if clients or data:
        return clients or max(1, devices // data)
    return max(n for n in range(1, devices + 1) if devices % n == 0 and n <= settings.cohort_size)


def row_tokens(model: ModelConfig, task: Task, microbatch: int, packed: bool) -> tuple[int, int]:
    """(Image, text) tokens of a row of the task at most."""
    samples, width = microbatch, model.max_text
    if packed:  # see `data.packing.packed`; texts beside images are few
        samples, width = max(microbatch, microbatch * SEQUENCE // model.image_tokens), SEQUENCE
    image, text = "image" in task.modalities, "text" in task.modalities
    return samples * model.image_tokens * image, microbatch * width * text


def row_bytes(model: ModelConfig, tokens: tuple[int, int], remat: str) -> int:
    """Bytes of what a row's forward pass leaves for its backward pass, in the compute type.

    Of an encoder layer these are ten arrays [M, D] (inputs of both norms, normalised inputs, query, key, value, what
    attention yields, dropped-out inputs of LoRA) and one [M, F], what GELU is applied to. Each path of a layer of the
    routed backbone has three feed-forward experts, two of them in front of query and value: four arrays of width D and
    three of F for each (before and behind GELU, and dropped out), and eight of width D beside. Recomputing keeps each
    layer's input, and one layer's arrays at a time.

    Args:
      tokens: M of (images, texts), see `row_tokens`.
      remat: "none" or "layer".
    """
    d, f = model.width, model.mlp
    encoder = 10 * d + f
    routed = model.backbone == "routed"
    path = 3 * (4 * d + 3 * f) + 8 * d if routed else encoder
    paths, depth = (4, sum(model.backbone_layers)) if routed else (1, sum(model.backbone_layers))
    total = 0
    for count, layers in zip(tokens, (model.image_layers, model.text_layers), strict=True):
        if not count:
            continue
        layers = layers if model.name == "flava" else 0
        kept = {KEPT: layers * encoder + depth * paths * path, LAYER: (layers + paths * depth) * d}[remat]
        once = {KEPT: 0, LAYER: max(encoder, paths * path)}[remat]
        total += count * (kept + once)
    return total * (2 if model.dtype == "bfloat16" else 4)
