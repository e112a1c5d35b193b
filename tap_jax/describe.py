"""What a configuration amounts to, from shapes alone: parameters, who owns which block, memory (Table 7).

Nothing is allocated, no data are read: the paper's sizes are described in seconds on any machine.

Letters: K clients, D devices, R blocks.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from tap_jax import assembly, blocks
from tap_jax import config as configuration
from tap_jax.blocks import Partition
from tap_jax.config import ConfigDict
from tap_jax.data.federated import SYNTHETIC_SIZES
from tap_jax.engine import parallel
from tap_jax.engine.memory_plan import MemoryPlan, memory_plan
from tap_jax.engine.settings import EngineSettings
from tap_jax.experiment import Experiment
from tap_jax.federation import Federation
from tap_jax.methods.base import Method
from tap_jax.models.accounting import account, counted_in_paper, shapes, table7
from tap_jax.models.server_model import ServerModel, to_compute_dtype
from tap_jax.step_cost import gradients_per_step, longest, task_flops

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Outline:
    """A configuration without its data.

    Attributes:
      patterns: per row of the client table, the numbers of its clients; all of them own the same blocks.
    """

    config: ConfigDict
    federation: Federation
    model: ServerModel
    partition: Partition
    patterns: tuple[tuple[int, ...], ...]


def outline(config: ConfigDict) -> Outline:
    """Everything of `experiment.build` that needs no data.

    Raises:
      UserError: whatever is wrong with the configuration.
    """
    configuration.validate(config)
    federation = configuration.federation_of(config)
    model = ServerModel(assembly.model_config(config, attention="einsum"), assembly.tasks_of(config, federation))
    patterns: dict[int, list[int]] = {}
    for number, client in enumerate(federation.clients):
        patterns.setdefault(client.pattern, []).append(number)
    partition = model.partition(federation.task_mask)
    return Outline(config, federation, model, partition, tuple(map(tuple, patterns.values())))


def parameters(config: ConfigDict) -> dict[str, float]:
    """Table 7's parameters of a configuration; see `tap_jax.models.accounting.table7`.

    Raises:
      UserError: whatever is wrong with the configuration.
    """
    return _table7(outline(config))


def describe(config: ConfigDict) -> str:
    """The text of `tap-jax describe`.

    Args:
      config: of any kind that `experiment.build` takes. `mesh.clients` and `mesh.data` may ask for more devices than
        there are here.
    """
    found = outline(config)
    parts = [_head(found), _paper(found), _patterns(found), _stored(found), _map(found), _memory(found)]
    parts.append(_flops(found))
    return "\n\n".join(parts) + "\n"


def headline(run: Experiment) -> list[str]:
    """What a run is about to do, once it is built."""
    config, partition, settings = run.config, run.partition, run.engine.settings
    sizes = _block_sizes(partition, run.engine.like)
    mine, server = partition.owned @ sizes, int(sizes[np.array(partition.sent)].sum())
    pushed = f"{settings.local_steps} steps of up to {config.batch_size} samples"
    memory = plan_of(run)
    device = max(memory.on_device(phase) for phase in memory.phases)
    whole = max(memory.together(phase) for phase in memory.phases)
    disk = f", {_size(sum(memory.disk.values()))} on disk" if memory.disk else ""
    return [
        _where(run),
        f"{config.method}: {config.rounds} rounds, {settings.cohort_size} of {len(run.federation.clients)} clients in"
        f" each, {pushed}; yields {', '.join(run.variants)}",
        _what(run),
        f"parameters a client trains: {mine.mean():,.0f} on average ({mine.min():,} to {mine.max():,}); the server's"
        f" model: {server:,}; frozen, stored once: {blocks.count(run.engine.frozen):,}",
        f"memory beside activations: {_size(device)} on a device, {_size(whole)} with the host{disk}",
    ]


def evaluation_headline(run: Experiment) -> list[str]:
    """What an evaluation is about to do, once the run is built."""
    return [_where(run), f"{run.config.method}: {run.config.rounds} rounds, finished", _what(run)]


def _where(run: Experiment) -> str:
    devices = run.engine.devices
    return f"{_devices(devices.shards, devices.parts)}, {run.model.config.dtype}"


def _what(run: Experiment) -> str:
    samples = [client.samples for client in run.engine.data]
    return (
        f"tasks: {', '.join(task.name for task in run.federation.tasks)}; data: {run.config.data.root},"
        f" {min(samples):,} to {max(samples):,} samples a client"
    )


# --- sections ------------------------------------------------------------------------------------------------------


def _head(found: Outline) -> str:
    config, federation = found.config, found.federation
    cohort = assembly.engine_settings(config, len(federation.clients)).cohort_size
    vocab = ", an upper bound: the tokenizer is trained on the data" if config.data.tokenizer == "train" else ""
    lines = [
        f"{config.model.name}, {config.method}: {config.rounds} rounds, {cohort} of {len(federation.clients)} clients"
        f" in each ({len(found.patterns)} patterns); yields {', '.join(configuration.variants_of(config))}",
        f"tasks: {', '.join(task.name for task in federation.tasks)}",
        _adapters(found.model),
    ]
    if any("text" in task.modalities for task in federation.tasks):
        lines.append(f"vocabulary: {config.model.vocab:,}{vocab}")
    return "\n".join(lines)


def _adapters(model: ServerModel) -> str:
    """Which backbone, and what is trained of it and of the encoders."""
    c = model.config
    if c.bottleneck:
        return f"backbone: {c.backbone}; adapters: bottlenecks of {c.bottleneck} behind every feed-forward network"
    delta = ", full weights on query and value" if c.qv_delta and c.backbone == "routed" else ""
    return (
        f"backbone: {c.backbone}; adapters: LoRA of rank {c.encoder_rank} in the encoders, in the backbone"
        f" {c.attention_rank} on query and value and {c.expert_rank} on feed-forward networks{delta}"
    )


def _table7(found: Outline) -> dict[str, float]:
    return table7(found.model, [_tasks(found, k) for k in range(len(found.federation.clients))])


def _paper(found: Outline) -> str:
    t = _table7(found)
    if not counted_in_paper(found.model):
        return (
            "Parameters, each stored once, mean over clients\n"
            f"  avg total {t['total']:,.1f} · avg trainable {t['trainable']:,.1f} · {t['percent']:.4f} %"
        )
    return (
        "Parameters as Table 7 counts them, mean over clients\n"
        f"  avg total {t['total']:,.1f} · avg trainable {t['trainable']:,.1f} · {t['percent']:.4f} %"
        f" · with TAP {t['tap_total']:,.1f} · {t['tap_percent']:.4f} %"
    )


def _patterns(found: Outline) -> str:
    doubled = counted_in_paper(found.model)
    rows = [("pattern", "clients", "total", "trainable", "%", *(("with TAP", "%") if doubled else ()), "tasks")]
    for number, clients in enumerate(found.patterns):
        tasks = _tasks(found, clients[0])
        counted = account(found.model, tasks)
        total, trainable = counted.total, counted.trainable
        rows.append(
            (
                str(number),
                ",".join(map(str, clients)) if len(clients) <= 5 else f"{clients[0]},{clients[1]},..,{clients[-1]}",
                f"{total:,}",
                f"{trainable:,}",
                f"{100 * trainable / total:.4f}",
                *((f"{total + trainable:,}", f"{200 * trainable / (total + trainable):.4f}") if doubled else ()),
                " ".join(task.name for task in tasks),
            )
        )
    return "The same per client pattern\n" + _columns(rows, left=(1, len(rows[0]) - 1))


def _stored(found: Outline) -> str:
    """Stored parameters, then the lines that lead from them to the paper's total, as means over clients."""
    clients = range(len(found.federation.clients))
    accounts = [account(found.model, _tasks(found, k)) for k in clients]

    def mean(values: Sequence[int]) -> str:
        return f"{np.mean(values):,.1f}"

    names = dict.fromkeys(name for one in accounts for name in one.copies)
    rows = [
        ("frozen weights it uses, each stored once", mean([one.frozen for one in accounts])),
        ("trainable blocks on its paths", mean([one.blocks for one in accounts])),
        ("= stored", mean([one.stored for one in accounts])),
    ]
    further = [
        ("not stored: trainables of experts on none of its paths", mean([one.idle_experts for one in accounts])),
        *((f"not stored: {name}", mean([one.copies.get(name, 0) for one in accounts])) for name in names),
        ("= avg total", mean([one.total for one in accounts])),
    ]
    counted = counted_in_paper(found.model)
    rows, title = (rows + further, "Stored and counted") if counted else (rows, "Stored")
    frozen, trainable = shapes(found.model)
    whole = (
        f"The run stores {blocks.count(frozen):,} frozen parameters once for all clients and"
        f" {blocks.count(trainable):,} of the server's {len(trainable)} blocks."
    )
    return f"{title}, mean over clients\n" + _columns(rows, left=(0,)) + "\n" + whole


def _map(found: Outline) -> str:
    """Blocks x patterns: # where the pattern's clients own the block."""
    partition = found.partition
    owned = partition.owned[[clients[0] for clients in found.patterns]]
    sizes = _block_sizes(partition, shapes(found.model)[1])
    digits = len(str(len(found.patterns) - 1))
    numbers = [str(number).rjust(digits) for number in range(len(found.patterns))]
    rows = [("", "parameters", "".join(number[place] for number in numbers)) for place in range(digits)]
    rows[:-1] = [("", "", number) for _, _, number in rows[:-1]]
    for r, name in enumerate(partition.names):
        rows.append((name, f"{sizes[r]:,}", "".join("#" if has else "." for has in owned[:, r])))
    return "Blocks x client patterns (# owns)\n" + _columns(rows, left=(0, 2))


def plan(found: Outline) -> MemoryPlan:
    """How much memory the run will need."""
    config, model = found.config, found.model
    settings = assembly.engine_settings(config, len(found.federation.clients))
    frozen, trainable = shapes(model)
    kept = jax.eval_shape(lambda tree: to_compute_dtype(tree, model.config.dtype), frozen)
    shards, parts = _mesh(config, settings)
    return _plan(
        found,
        found.partition.with_private(model.adapter_blocks),
        assembly.method_of(config, model, configuration.variants_of(config)),
        settings,
        like=trainable,
        frozen=blocks.size_bytes(kept),
        data=_data_bytes(found),
        shards=shards,
        parts=parts,
    )


def plan_of(run: Experiment) -> MemoryPlan:
    """The same of a run that is built: the size of its data is known."""
    engine = run.engine
    return _plan(
        run,
        run.partition,
        run.method,
        engine.settings,
        like=engine.like,
        frozen=blocks.size_bytes(engine.frozen),
        data=blocks.size_bytes((engine.arrays, run.evaluator.arrays)),
        shards=engine.devices.shards,
        parts=engine.devices.parts,
    )


def _plan(found: Outline | Experiment, partition: Partition, method: Method, settings: EngineSettings, **sizes: Any):
    config = found.config
    variants, clients = configuration.variants_of(config), len(found.federation.clients)
    return memory_plan(
        found.model,
        partition,
        method,
        settings,
        made=any(variant not in configuration.SERVER_VARIANTS for variant in variants),
        after=any(variant not in (*configuration.SERVER_VARIANTS, "local") for variant in variants),
        host_bytes=assembly.host_bytes(config, clients),
        **sizes,
    )


def _mesh(config: ConfigDict, settings: EngineSettings) -> tuple[int, int]:
    """(Shards, devices of each) as a run here would choose them; as the configuration says where it asks for more."""
    asked = (config.mesh.clients, config.mesh.data or 1)
    if config.mesh.clients and asked[0] * asked[1] > len(jax.devices()):
        return asked
    here = parallel.devices(**config.mesh, cohort=settings.together)
    return here.shards, here.parts


def _memory(found: Outline) -> str:
    """What lies where, in MiB."""
    memory = plan(found)
    settings = assembly.engine_settings(found.config, len(found.federation.clients))
    known = "" if _data_bytes(found) else " and data"
    names = {"frozen weights": f"frozen weights ({found.model.config.dtype})"}
    rows = [(names.get(name, name), size) for name, size in memory.always.items()]
    for title, phase in memory.phases.items():
        rows += [(f"{title}, {phase.clients} clients: {name}", size) for name, size in phase.parts.items()]
        rows.append((f"= {title}, without activations{known}", memory.on_device(title)))
    host = [*memory.host.items(), *memory.finished.items()]
    kind = "the device" if memory.devices == 1 else f"all {memory.devices} devices"
    together = [(f"= {title}, the host and {kind}", memory.together(title)) for title in memory.phases]
    notes = ["Activations are not estimated, nor what a method holds within a step: `tap-jax bench` reports the peak."]
    if known:
        notes.append("Neither are the data, whose size is known once they are read (data.train_size bounds it).")

    def in_mib(lines):
        return _columns([(name, f"{size / MIB:,.1f}") for name, size in lines], left=(0,))

    return "\n".join(
        [
            f"Memory per device in MiB, {_devices(*_mesh(found.config, settings))}",
            in_mib(rows),
            *(("On the host", in_mib(host)) if host else ()),
            *(
                ("On disk, in the run's folder (engine.host_gigabytes)", in_mib(memory.disk.items()))
                if memory.disk
                else ()
            ),
            f"Together, without activations{known}",
            in_mib(together),
            *notes,
        ]
    )


def _flops(found: Outline) -> str:
    """What a local step does at most, without any data to know the lengths of texts."""
    config, model = found.config, found.model
    costs = task_flops(model, {task.name: longest(model, task) for task in model.tasks})
    rows = [("task", "forward", "backward", "both")]
    for name, flops in costs.items():
        rows.append((name, *(f"{value / 1e9:,.4g}" for value in (flops.forward, flops.backward, flops.total))))
    gradients = {1: "", 2: ", twice a step"}.get(gradients_per_step(config), f"; '{config.method}' does more in a step")
    totals = [flops.total * config.batch_size / 1e12 for flops in costs.values()]
    return (
        "FLOPs per sample in 10^9: products only, a multiply-add is 2, frozen weights have no gradient\n"
        + _columns(rows, left=(0,))
        + f"\nFor texts and answers as long as the model takes them{gradients}. A minibatch of {config.batch_size}:"
        f" {min(totals):,.3g} to {max(totals):,.3g} x 10^12."
    )


# --- pieces --------------------------------------------------------------------------------------------------------


def _tasks(found: Outline, client: int):
    """The client's tasks, with the classes in use."""
    mine = found.federation.clients[client].shares
    return tuple(task for task in found.model.tasks if task.name in mine)


def _block_sizes(partition: Partition, like: blocks.Blocks) -> np.ndarray:
    """Parameters of every block [R]; a private one has as many as its twin."""
    return np.array([blocks.count(like[name.removeprefix(blocks.PRIVATE)]) for name in partition.names])


def _data_bytes(found: Outline) -> int | None:
    """Bound on the data's bytes on a device, or None where nothing bounds the number of samples."""
    config = found.config
    drawn = SYNTHETIC_SIZES if config.data.root == "synthetic" else {"train": 0, "test": 0}
    sizes = [config.data[f"{part}_size"] or drawn[part] for part in ("train", "test")]
    if not all(sizes):
        return None
    total = 0
    for task in found.model.tasks:
        total += 64 * 64 * 3 * ("image" in task.modalities)
        total += 4 * config.model.max_text * ("text" in task.modalities)
        total += 4 * config.model.max_answer * (task.kind == "text_generation") + 4 * (task.classes > 0)
    return sum(sizes) * total


def _devices(shards: int, parts: int) -> str:
    mesh = f" (mesh of {shards} x {parts})" if shards * parts > 1 else ""
    return f"{shards * parts} x {jax.devices()[0].device_kind}{mesh}"


def _size(count: int) -> str:
    """Bytes in MiB or GiB."""
    return f"{count / MIB:,.3g} MiB" if count < 1000 * MIB else f"{count / MIB / 1024:,.3g} GiB"


def _columns(rows: Sequence[Sequence[str]], *, left: Sequence[int]) -> str:
    """Lines of aligned columns; those numbered in `left` lean to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) if i in left else cell.rjust(width) for i, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    return "\n".join(f"  {line}".rstrip() for line in lines)
