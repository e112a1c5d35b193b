"""How much memory a run will need: the plan of a configuration's outline, or of a run that is built."""

from typing import Any

import jax

from tap_jax import assembly, blocks, device_sizes
from tap_jax import config as configuration
from tap_jax.blocks import Partition
from tap_jax.config import ConfigDict
from tap_jax.data.federated import SYNTHETIC_SIZES
from tap_jax.engine import parallel
from tap_jax.engine.memory_plan import MemoryPlan, memory_plan
from tap_jax.engine.settings import EngineSettings
from tap_jax.experiment import Experiment
from tap_jax.methods.base import Method
from tap_jax.models.accounting import shapes
from tap_jax.models.server_model import to_compute_dtype
from tap_jax.planning.outline import Outline
from tap_jax.registry import server_variants

MIB = 2**20


def plan(found: Outline) -> MemoryPlan:
    """Of a configuration; of its data, the bound that it sets, if any."""
    config, model = device_sizes.sized(found.config, found.federation, devices=len(jax.devices())), found.model
    settings = assembly.engine_settings(config, len(found.federation.clients))
    frozen, trainable = shapes(model)
    kept = jax.eval_shape(lambda tree: to_compute_dtype(tree, model.config.dtype), frozen)
    shards, parts = mesh(config, settings)
    return _plan(
        found,
        found.partition.with_private(model.adapter_blocks),
        assembly.method_of(config, model, configuration.variants_of(config)),
        settings,
        like=trainable,
        frozen=blocks.size_bytes(kept),
        data=data_bytes(found),
        shards=shards,
        parts=parts,
    )


def plan_of(run: Experiment) -> MemoryPlan:
    """Of a run that is built: the size of its data is known."""
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


def mesh(config: ConfigDict, settings: EngineSettings) -> tuple[int, int]:
    """(Shards, devices of each) as a run here would choose them; as the configuration says where it asks for more."""
    asked = (config.mesh.clients or 1, config.mesh.data or 1)
    if asked[0] * asked[1] > len(jax.devices()):
        return asked
    here = parallel.devices(**config.mesh, cohort=settings.cohort_size)
    return here.shards, here.parts


def data_bytes(found: Outline) -> int | None:
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


def _plan(
    found: Outline | Experiment, partition: Partition, method: Method, settings: EngineSettings, **sizes: Any
) -> MemoryPlan:
    config = found.config
    variants, clients = configuration.variants_of(config), len(found.federation.clients)
    return memory_plan(
        found.model,
        partition,
        method,
        settings,
        made=any(variant not in server_variants() for variant in variants),
        after=any(variant not in (*server_variants(), "local") for variant in variants),
        host_bytes=assembly.host_bytes(config, clients),
        **sizes,
    )
