"""How much memory a run will need: the plan of a configuration's outline, or of a run that is built."""

from typing import Any

import jax

from tap_jax import assembly, blocks, device_sizes
from tap_jax.blocks import Partition
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
    sections, model = device_sizes.sized(found.sections, len(jax.devices())), found.model
    frozen, trainable = shapes(model)
    kept = jax.eval_shape(lambda tree: to_compute_dtype(tree, model.config.dtype), frozen)
    shards, per_shard = mesh(sections.engine)
    return _plan(
        found,
        found.partition.with_private(model.adapter_blocks),
        assembly.method_of(sections, model),
        sections.engine,
        like=trainable,
        frozen=blocks.size_bytes(kept),
        data=data_bytes(found),
        shards=shards,
        per_shard=per_shard,
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
        per_shard=engine.devices.per_shard,
    )


def mesh(settings: EngineSettings) -> tuple[int, int]:
    """(Shards, devices of each) as a run here would choose them; as the configuration says where it asks for more."""
    asked = (settings.mesh.clients or 1, settings.mesh.data or 1)
    if asked[0] * asked[1] > len(jax.devices()):
        return asked
    here = parallel.devices(*settings.mesh, cohort=settings.cohort_size)
    return here.shards, here.per_shard


def data_bytes(found: Outline) -> int | None:
    """Bound on the data's bytes on a device, or None where nothing bounds the number of samples."""
    settings = found.sections.data
    drawn = SYNTHETIC_SIZES if settings.root == "synthetic" else {"train": 0, "test": 0}
    sizes = [settings.size(part) or drawn[part] for part in ("train", "test")]
    if not all(sizes):
        return None
    total = 0
    for task in found.model.tasks:
        total += 64 * 64 * 3 * ("image" in task.modalities)
        total += 4 * settings.max_text * ("text" in task.modalities)
        total += 4 * settings.max_answer * (task.kind == "text_generation") + 4 * (task.classes > 0)
    return sum(sizes) * total


def _plan(
    found: Outline | Experiment, partition: Partition, method: Method, settings: EngineSettings, **sizes: Any
) -> MemoryPlan:
    variants = found.sections.variants
    return memory_plan(
        found.model,
        partition,
        method,
        settings,
        made=any(variant not in server_variants() for variant in variants),
        # FedDAT's models are put together on the devices even where nothing is trained.
        after=any(found.sections.post_periods) or bool(found.model.adapter_blocks),
        **sizes,
    )
