"""What a run, or an evaluation, is about to do: the lines at its start."""

import jax
import numpy as np

from tap_jax import blocks
from tap_jax.experiment import Experiment
from tap_jax.planning.outline import block_sizes
from tap_jax.planning.planned_memory import MIB, plan_of


def headline(run: Experiment) -> list[str]:
    """What a run is about to do, once it is built."""
    partition, settings = run.partition, run.engine.settings
    sizes = block_sizes(partition, run.engine.like)
    mine, server = partition.owned @ sizes, int(sizes[np.array(partition.sent)].sum())
    pushed = f"{settings.local_steps} steps of up to {settings.batch} samples"
    memory = plan_of(run)
    device = max(memory.on_device(phase) for phase in memory.phases)
    whole = max(memory.together(phase) for phase in memory.phases)
    disk = f", {_size(sum(memory.disk.values()))} on disk" if memory.disk else ""
    return [
        _where(run),
        f"{run.sections.method.name}: {settings.rounds} rounds, {settings.cohort_size} of"
        f" {len(run.federation.clients)} clients in each, {pushed}; yields {', '.join(run.variants)}",
        _what(run),
        f"parameters a client trains: {mine.mean():,.0f} on average ({mine.min():,} to {mine.max():,}); the server's"
        f" model: {server:,}; frozen, stored once: {blocks.count(run.engine.frozen):,}",
        f"memory beside activations: {_size(device)} on a device, {_size(whole)} with the host{disk}",
    ]


def evaluation_headline(run: Experiment) -> list[str]:
    """What an evaluation is about to do, once the run is built."""
    return [_where(run), f"{run.sections.method.name}: {run.engine.settings.rounds} rounds, finished", _what(run)]


def _where(run: Experiment) -> str:
    devices = run.engine.devices
    return f"{devices_named(devices.shards, devices.per_shard)}, {run.model.config.dtype}"


def _what(run: Experiment) -> str:
    samples = [client.samples for client in run.engine.data]
    places = {task.source.path or run.sections.data.root: None for task in run.federation.tasks}
    return (
        f"tasks: {', '.join(task.name for task in run.federation.tasks)}; data: {', '.join(places)},"
        f" {min(samples):,} to {max(samples):,} samples a client"
    )


def devices_named(shards: int, parts: int) -> str:
    """How many devices of which kind: "8 x cpu (mesh of 2 x 4)"."""
    mesh = f" (mesh of {shards} x {parts})" if shards * parts > 1 else ""
    return f"{shards * parts} x {jax.devices()[0].device_kind}{mesh}"


def _size(count: int) -> str:
    """Bytes in MiB or GiB."""
    return f"{count / MIB:,.3g} MiB" if count < 1000 * MIB else f"{count / MIB / 1024:,.3g} GiB"
