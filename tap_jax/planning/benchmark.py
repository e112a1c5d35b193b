"""`tap-jax bench`: how fast local training runs here, as one JSON object. Every speed claim is a line of it.

What is timed is what a round does: drawing the plan on the host and N local steps of a whole cohort on the devices.
Whole rounds and Stage 2 are timed only where asked; so is PyTorch, in turns with JAX.
"""

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from tap_jax import experiment
from tap_jax.config import ConfigDict, method_settings
from tap_jax.data.sampling import sample_cohort
from tap_jax.data.task_groups import fields
from tap_jax.engine.cohort import Cohort
from tap_jax.engine.local_training import Losses
from tap_jax.engine.memory import peak_memory
from tap_jax.errors import UserError
from tap_jax.experiment import Experiment
from tap_jax.methods.base import State
from tap_jax.planning.minibatches import Batch, client_minibatches
from tap_jax.planning.useful_share import Costs, Measure, Share
from tap_jax.platforms import peak_tflops

REPEATS = 5
RIVALS = ("torch", "torch-fused")

Steps = Sequence[Sequence[Batch]]  # of one client
Say = Callable[[str], None]


def bench(
    config: ConfigDict, *, steps: int = 0, rounds: int = 0, against: str = "", say: Say = lambda line: None
) -> dict[str, Any]:
    """Times the local training of the cohort of round 0, every client taking N steps.

    Args:
      config: as for training; its own local_steps is N where `steps` is 0.
      rounds: whole rounds to time besides, with the configuration's own steps; N is then at most its post_steps.
      against: "torch" or "torch-fused" (AdamW as one kernel) has PyTorch train the same clients on the same
        minibatches, one after the other, in turns with JAX.
      say: gets a line before each slow part.

    Returns:
      client_steps_per_s, samples_per_s (median of `REPEATS` runs); tflops and mfu of what the algorithm needs for the
      real samples and tokens, null where the method's steps or the device's peak are not known; flops_per_client_step;
      useful_share, see `planning.useful_share`; compile_s (the first run less a median one); peak_bytes (of the fullest
      device, or of this process's host memory where devices do not tell, see `peak_of`); what `_rounds` and `_turns`
      find, else null; and what was run.

    Raises:
      UserError: what `experiment.build` objects to, or arguments that do not go together.
    """
    steps = steps or config.local_steps
    entry, settings = method_settings(config)
    _check(steps, rounds, against, config.post_steps, entry.name, entry.gradients(settings))
    config = config.copy_and_resolve_references()
    # The phase after the rounds is timed: it takes all its steps however few samples a client has. Rounds need the
    # program for the configuration's own steps, which can stop earlier.
    if not rounds:
        config.local_steps = config.post_steps = steps
    say("bench: reading data, building the model")
    run = experiment.build(config)
    engine = run.engine
    clients = sample_cohort(engine.settings.seed, 0, len(run.federation.clients), engine.settings.cohort_size).tolist()
    cohort = Cohort.of(engine, clients, 0)
    todo = [_minibatches(run, client, steps) for client in clients]

    say(f"bench: compiling, then {REPEATS} runs of {steps} steps with {len(clients)} clients")
    train = functools.partial(_train, cohort, run.init(), steps)
    first, losses = train()
    played = _rounds(run, rounds, say) if rounds else dict.fromkeys(ROUND_FIELDS)
    peak = peak_memory(engine.devices.local)  # before PyTorch takes memory
    ready = functools.partial(_rival, run, clients, todo, fused=against == "torch-fused") if against else None
    times, compared = _turns(run, cohort, train, ready, losses)

    median, taken = statistics.median(times), sum(map(len, todo))
    samples = sum(len(batch) for mine in todo for step in mine for batch in step)
    peak_of = "device" if "peak_device_bytes" in peak else "host"
    names = {name for client in clients for name in run.federation.clients[client].shares}
    widths = {task.name: _widths(run, task.name) for task in run.federation.tasks if task.name in names}
    costs = Costs(run.model, "gradient")
    return {
        "client_steps_per_s": _short(taken / median),
        "samples_per_s": _short(samples / median),
        **_speed(run, costs, todo, median, taken),
        "useful_share": _short(_useful_share(run, costs, cohort)),
        "compile_s": _short(max(0.0, first - median)),
        "peak_bytes": peak[f"peak_{peak_of}_bytes"],
        "peak_of": peak_of,
        **played,
        **compared,
        "device": jax.devices()[0].device_kind,
        "devices": engine.devices.size,
        "clients": len(clients),
        "steps": steps,
        "seconds": [_short(value) for value in times],
        "batch_size": engine.settings.batch,
        "microbatch": engine.settings.microbatch,
        "packed": engine.settings.packed,
        "dtype": run.model.config.dtype,
        "attention": run.model.config.attention,
        "tasks": list(widths),
        "text_tokens": {name: shape["tokens"][0] for name, shape in widths.items() if "tokens" in shape},
        "answer_tokens": {name: shape["answers"][0] for name, shape in widths.items() if "answers" in shape},
        "vocab": run.model.config.vocab,
        "jax": jax.__version__,
    }


def _check(steps: int, rounds: int, against: str, post_steps: int, method: str, gradients: int | None) -> None:
    if steps < 0:
        raise UserError(f"steps: {steps}; use at least 1, or 0 for the configuration's local_steps")
    if rounds < 0:
        raise UserError(f"rounds: {rounds}; use at least 1, or 0 for none")
    if rounds and steps > post_steps:
        raise UserError(f"steps: {steps}; with rounds use at most post_steps = {post_steps}")
    if against and against not in RIVALS:
        raise UserError(f"against: unknown '{against}'; use one of {', '.join(RIVALS)}")
    if against and gradients != 1:
        raise UserError(f"against: PyTorch has no steps of '{method}' here; use --config.method=tap")
    if against and jax.process_count() > 1:
        raise UserError("against: PyTorch trains in one process; drop --coordinator")


def _train(cohort: Cohort, state: State, steps: int) -> tuple[float, Losses]:
    """Seconds for so many steps of the cohort, from the server's blocks, and the losses."""
    params = jax.block_until_ready(cohort.broadcast(state.server))
    opt_state = cohort.opt_state(state, "post") if cohort.engine.settings.persist else None
    started = time.perf_counter()
    _, _, losses = jax.block_until_ready(cohort.train_steps(params, opt_state, "post", (0, steps), post=True))
    return time.perf_counter() - started, losses


def _minibatches(run: Experiment, client: int, steps: int) -> Steps:
    """Those that `_train` draws."""
    engine, settings = run.engine, run.engine.settings
    return client_minibatches(
        engine.data,
        client,
        engine.task_groups,
        run.data.train,
        seed=settings.seed,
        round_=0,
        phase="post",
        batch=settings.batch,
        steps=steps,
        epochs=None,
    )


def _widths(run: Experiment, task: str) -> dict[str, tuple[int, ...]]:
    return {name: array.shape[1:] for name, array in fields(run.data.train[task]).items()}


# --- floating-point operations -------------------------------------------------------------------------------------


def _speed(run: Experiment, costs: Costs, todo: Sequence[Steps], seconds: float, steps: int) -> dict[str, Any]:
    """tflops, mfu and what they are made of; of all devices together."""
    gradients = run.sections.gradients
    if gradients is None:
        return dict.fromkeys(("tflops", "mfu", "flops_per_client_step"))
    # Where a step takes several gradients, each has a minibatch of its own; they are alike.
    useful = gradients * sum(costs.batch(batch.stream.task, batch.fields) for mine in todo for s in mine for batch in s)
    tflops = useful / seconds / 1e12
    peak = peak_tflops(jax.devices()[0].device_kind, run.model.config.dtype)
    return {
        "tflops": _short(tflops),
        "mfu": None if peak is None else _short(tflops / (peak * run.engine.devices.size)),
        "flops_per_client_step": round(useful / steps),
    }


def _useful_share(run: Experiment, costs: Costs, cohort: Cohort) -> float:
    """Of the minibatches that `_train` draws."""
    engine, total = run.engine, Share()
    measured = Measure(costs, engine.task_groups, engine.shapes, run.data.train)
    drawn = cohort.plan("post", post=True)
    for shard in range(engine.devices.shards):
        plan = jax.tree.map(lambda leaf, at=shard: leaf[at], drawn)
        plan = plan.replace(rows=jax.tree.map(lambda leaf: leaf[0], plan.rows))
        total = sum(measured.plan(plan).values(), total)
    return total.share


# --- rounds and Stage 2 --------------------------------------------------------------------------------------------

ROUND_FIELDS = ("round_s", "schedule_s", "stage2_s_per_client", "stage2_s", "round_seconds", "stage2_clients")


def _rounds(run: Experiment, rounds: int, say: Say) -> dict[str, Any]:
    """Whole rounds of the method, from round 1 on, and Stage 2 of one client of each pattern.

    Returns:
      round_s (median), schedule_s (the mean times all the configuration's rounds, since cohorts differ). With TAP
      stage2_s_per_client: P steps of the teacher and P of the student, mean over clients of all patterns, a cohort at a
      time; and stage2_s, the same for all clients. What it took until then to evaluate or write is not in them.
    """
    say(f"bench: {rounds} rounds after one that compiles the rest")
    state, times = run.init(), []
    for _ in range(1 + rounds):
        started = time.perf_counter()
        state, _ = run.round(state)
        jax.block_until_ready(state.server)
        times.append(time.perf_counter() - started)
    del times[0]
    found = {
        "round_s": _short(statistics.median(times)),
        "schedule_s": _short(statistics.mean(times) * run.engine.settings.rounds),
        "round_seconds": [_short(value) for value in times],
    }
    if (entry := run.sections.method).personal:
        say("bench: Stage 2 of one client of each pattern")
        found |= _stage2(run, state, entry.default)
    return dict.fromkeys(ROUND_FIELDS) | found


def _stage2(run: Experiment, state: State, variant: str) -> dict[str, Any]:
    everyone = run.federation.clients
    first: dict[int, int] = {}
    for number, client in enumerate(everyone):
        first.setdefault(client.pattern, number)
    chosen, size, seconds = list(first.values()), run.engine.settings.cohort_size, 0.0
    for part in (chosen[start : start + size] for start in range(0, len(chosen), size)):
        cohort = Cohort.of(run.engine, part, int(state.round))
        started = time.perf_counter()
        next(iter(run.method.finish(cohort, state, (variant,))))  # the models come to the host: nothing is left to wait
        seconds += time.perf_counter() - started
    each = seconds / len(chosen)
    return {"stage2_s_per_client": _short(each), "stage2_s": _short(each * len(everyone)), "stage2_clients": chosen}


# --- PyTorch -------------------------------------------------------------------------------------------------------

RIVAL_FIELDS = ("torch_client_steps_per_s", "ratio", "loss_difference", "torch_seconds", "torch_device", "torch_error")


def _rival(run: Experiment, clients: Sequence[int], todo: Sequence[Steps], *, fused: bool):
    """The same clients, steps and rates in PyTorch, ready to run."""
    from tap_jax.planning.sequential import SequentialTrainer  # and with it PyTorch

    settings = run.engine.settings
    return SequentialTrainer(
        run.model,
        run.engine.frozen,
        run.initial_blocks,
        todo,
        [list(run.federation.clients[client].shares) for client in clients],
        tokenizer=run.data.tokenizer,
        bfloat16=run.model.config.dtype == "bfloat16",
        rate=settings.post_rate,
        weight_decay=settings.training.weight_decay,
        clip_norm=settings.training.clip_norm,
        fused=fused,
    )


def _turns(
    run: Experiment, cohort: Cohort, train: Callable, ready: Callable | None, losses: Losses
) -> tuple[list[float], dict[str, Any]]:
    """Times JAX (`train`), and in turns with it the rival that `ready` makes -> (seconds, the comparison).

    The comparison: torch_client_steps_per_s; ratio, PyTorch's median time by JAX's; loss_difference, the largest
    relative one of a client's mean loss on a task, where with dropout the two draw different masks; or torch_error,
    where PyTorch cannot (a GPU's memory may not do for both), which is no reason to lose what JAX takes.
    """
    rival, found = None, dict.fromkeys(RIVAL_FIELDS)
    if ready is not None:
        try:
            rival = ready()
            rival.run()  # the first run allocates
        except (ImportError, OSError, RuntimeError) as error:
            rival, found["torch_error"] = None, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if rival is None:
        return [train()[0] for _ in range(REPEATS)], found
    ours, theirs = [], []
    for _ in range(REPEATS):
        ours.append(train()[0])
        theirs.append(rival.run())
    seconds = [taken for taken, _ in theirs]
    median, steps = statistics.median(seconds), sum(map(len, rival.steps))
    return ours, found | {
        "torch_client_steps_per_s": _short(steps / median),
        "ratio": _short(median / statistics.median(ours)),
        "loss_difference": _difference(run, cohort, losses, theirs[-1][1]),
        "torch_seconds": [_short(value) for value in seconds],
        "torch_device": str(rival.device),
    }


def _difference(run: Experiment, cohort: Cohort, losses: Losses, theirs: Sequence[Mapping[str, float]]) -> float | None:
    """`theirs`: per client of the cohort in increasing order, task -> mean loss; None where a loss is no number."""
    mean, seen = np.asarray(losses.mean()), np.asarray(losses.seen)
    names, gaps = [task.name for task in run.federation.tasks], [0.0]
    positions = sorted((client, position) for position, client in enumerate(cohort.clients) if client >= 0)
    for (_, position), found in zip(positions, theirs, strict=True):
        mine = {names[o]: mean[position, o] for o in np.flatnonzero(seen[position])}
        if mine.keys() != found.keys():
            raise ValueError(f"bench: JAX has trained on {sorted(mine)}, PyTorch on {sorted(found)}")
        gaps += [abs(float(mine[name]) - loss) / abs(loss) for name, loss in found.items()]
    return _short(float(np.max(gaps))) if np.isfinite(gaps).all() else None


def _short(value: float) -> float:
    return float(f"{value:.5g}")
