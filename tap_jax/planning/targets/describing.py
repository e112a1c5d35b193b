"""Builds a run for a target and compiles its programs, in the process that is for it; see `session`."""

from collections.abc import Callable, Collection
from typing import Any

from tap_jax import assembly, device_sizes
from tap_jax.config import ConfigDict
from tap_jax.errors import UserError
from tap_jax.experiment import Experiment, build
from tap_jax.planning.targets import roofline
from tap_jax.planning.targets.compile import Built, compile_program
from tap_jax.planning.targets.programs import programs
from tap_jax.planning.targets.topology import Target, devices
from tap_jax.platforms import GIB, platform_of


def built(config: ConfigDict, target: Target) -> Experiment:
    """The run, for devices that are not here.

    Raises:
      UserError: what `topology.devices` and `experiment.build` raise; of data it names `data.root`.
    """
    found = devices(target)
    try:
        return build(config, target=found)
    except UserError as error:
        if str(error).startswith(("data.root", "data.tokenizer")):
            raise UserError(
                f"{error}; to compile without the run's own data: --config.data.root=synthetic"
                " --config.data.tokenizer=train"
            ) from None
        raise


def serve(
    send: Callable[[Any], None],
    config: ConfigDict,
    target: Target,
    done: Collection[str],
    only: Callable[[str], bool],
) -> None:
    """Sends `Built`, then a `Found` of each program that is not done."""
    run = built(config, target)
    engine, platform = run.engine, platform_of(run.engine.devices.mesh.devices.flat[0])
    wanted = [program for program in programs(run) if only(program.phase)]
    send(
        Built(
            about(run, target),
            tuple(program.name for program in wanted),
            platform,
            engine.devices.size,
            roofline.planned_work(run),
            roofline.calls(run),
        )
    )
    for program in wanted:
        if program.name not in done:
            found, _ = compile_program(
                program.lower, platform, name=program.name, phase=program.phase, bodies=program.bodies
            )
            send(found)


def about(run: Experiment, target: Target) -> tuple[str, ...]:
    """Lines on the target and on what was chosen for it."""
    devices, settings, model = run.engine.devices, run.engine.settings, run.model.config
    platform = devices.platform
    memory = "memory not known" if platform.memory is None else f"{platform.memory / GIB:.4g} GiB each"
    peak = "" if platform.peak is None else f", {platform.peak / 1e12:.4g} TFLOP/s in bfloat16"
    mesh = f"mesh of {devices.shards} x {devices.per_shard}"
    return (
        f"{target.name}: {devices.size} x {platform.device} ({mesh}), {memory}{peak}",
        f"{model.dtype}, attention '{model.attention}', rows of {settings.microbatch}, remat {model.remat},"
        f" {settings.cohort_size} clients in a round and {settings.clients_at_once} at once after the last",
    )


def sizes(send: Callable[[Any], None], config: ConfigDict, target: Target) -> None:
    """Sends what fits by the estimate, the fastest first (`device_sizes.choices`)."""
    found = devices(target)
    sections = assembly.cut(config, platform_of(found[0]), attention="einsum")
    send(device_sizes.choices(sections, len(found)))
