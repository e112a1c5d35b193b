"""The text of `tap-jax describe`: parameters, who owns which block, memory, FLOPs (Table 7).

It follows from shapes alone: nothing is allocated, and of the data only the clients' names are read, where they name
them.
"""

from collections.abc import Collection, Sequence

import numpy as np

from tap_jax import blocks
from tap_jax.data import federated
from tap_jax.device_sizes import sized
from tap_jax.experiment import training_data
from tap_jax.models.accounting import account, counted_in_paper, shapes
from tap_jax.models.server_model import ServerModel
from tap_jax.planning.columns import columns
from tap_jax.planning.headline import devices_named
from tap_jax.planning.outline import Outline, block_sizes
from tap_jax.planning.planned_memory import MIB, data_bytes, mesh, plan
from tap_jax.planning.step_cost import padded_batch, task_flops
from tap_jax.planning.useful_share import measure, report


def describe(found: Outline, *, plans: int = 0) -> str:
    """The text of `tap-jax describe`.

    Args:
      found: of a configuration whose `mesh.clients` and `mesh.data` may ask for more devices than there are here.
      plans: rounds whose plans are drawn from the run's data, to measure the useful share of the arithmetic; 0: none,
        and no data are read.
    """
    parts = [
        _head(found),
        *_clients(found),
        _paper(found),
        _patterns(found),
        _stored(found),
        _map(found),
        _memory(found),
    ]
    parts.append(_flops(found))
    if plans:
        parts.append(useful(found, plans))
    return "\n\n".join(parts) + "\n"


def _head(found: Outline) -> str:
    sections, federation, settings = found.sections, found.federation, found.sections.engine
    vocab = ", an upper bound: the tokenizer is trained on the data" if sections.data.tokenizer == "train" else ""
    lines = [
        f"{sections.model.name}, {sections.method.name}: {settings.rounds} rounds, {settings.cohort_size} of"
        f" {len(federation.clients)} clients in each ({len(found.patterns)} patterns); yields"
        f" {', '.join(sections.variants)}",
        f"tasks: {', '.join(task.name for task in federation.tasks)}",
        _adapters(found.model),
    ]
    if any("text" in task.modalities for task in federation.tasks):
        lines.append(f"vocabulary: {sections.model.vocab:,}{vocab}")
    return "\n".join(lines)


_LISTED = 16  # clients of a long list, most of them its first


def _clients(found: Outline) -> list[str]:
    """Clients x tasks: training samples, where the data name the clients."""
    federation = found.federation
    if not federation.named:
        return []
    tasks, everybody = [task.name for task in federation.tasks], federation.clients

    def line(name: str, counts: Sequence[int]) -> tuple[str, ...]:
        return (name, *(f"{n:,}" if n else "." for n in counts), f"{sum(counts):,}")

    table = [line(one.name, [one.samples.get(task, 0) for task in tasks]) for one in everybody]
    if len(table) > _LISTED:
        gap = (f".. {len(table) - _LISTED:,} more", *[""] * (len(tasks) + 1))
        table = [*table[: _LISTED - 4], gap, *table[-4:]]
    totals = line("samples", [sum(one.samples.get(task, 0) for one in everybody) for task in tasks])
    owners = line("clients", [sum(task in one.samples for one in everybody) for task in tasks])[:-1]
    rows = [("client", *tasks, "samples"), *table, totals, (*owners, f"{len(everybody):,}")]
    return ["Clients x tasks, training samples\n" + _columns(rows, left=(0,))]


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


def _paper(found: Outline) -> str:
    t = found.table7()
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
        tasks = found.tasks_of(clients[0])
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
    accounts = [account(found.model, found.tasks_of(k)) for k in clients]

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
    sizes = block_sizes(partition, shapes(found.model)[1])
    digits = len(str(len(found.patterns) - 1))
    numbers = [str(number).rjust(digits) for number in range(len(found.patterns))]
    rows = [("", "parameters", "".join(number[place] for number in numbers)) for place in range(digits)]
    rows[:-1] = [("", "", number) for _, _, number in rows[:-1]]
    for r, name in enumerate(partition.names):
        rows.append((name, f"{sizes[r]:,}", "".join("#" if has else "." for has in owned[:, r])))
    return "Blocks x client patterns (# owns)\n" + _columns(rows, left=(0, 2))


def _memory(found: Outline) -> str:
    """What lies where, in MiB."""
    memory = plan(found)
    known = "" if data_bytes(found) else " and data"
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
            f"Memory per device in MiB, {devices_named(*mesh(found.sections.engine))}",
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
    sections, model, batch = found.sections, found.model, found.sections.engine.batch
    size = {"text": model.config.max_text, "answer": model.config.max_answer - 1}
    costs = {task.name: task_flops(model, task, padded_batch(task, 1, **size)) for task in model.tasks}
    rows = [("task", "forward", "backward", "both")]
    for name, flops in costs.items():
        rows.append((name, *(f"{value / 1e9:,.4g}" for value in (flops.forward, flops.backward, flops.total))))
    more = f"; '{sections.method.name}' does more in a step"
    gradients = {1: "", 2: ", twice a step"}.get(sections.gradients, more)
    totals = [flops.total * batch / 1e12 for flops in costs.values()]
    return (
        "FLOPs per sample in 10^9: products only, a multiply-add is 2, frozen weights have no gradient\n"
        + _columns(rows, left=(0,))
        + f"\nFor texts and answers as long as the model takes them{gradients}. A minibatch of {batch}:"
        f" {min(totals):,.3g} to {max(totals):,.3g} x 10^12."
    )


def useful(found: Outline, plans: int, devices: int = 1) -> str:
    """How much of the arithmetic is for samples and tokens that are there.

    Args:
      plans: rounds whose plans are drawn.
      devices: how many there are of those whose sizes of rows are taken where the configuration leaves them open.

    Raises:
      UserError: the data cannot be read.
    """
    sections, settings = found.sections, sized(found.sections, devices).engine
    data = federated.build(found.federation, found.model.tasks, sections.data)
    shares = measure(
        found.model,
        found.federation,
        data,
        training_data(data, sections.data)[0],
        settings,
        personal=sections.method.personal,
        plans=plans,
    )
    packed = ", packed" if settings.packed else ""
    title = f"Plans of {plans} rounds and of the last phases, rows of {settings.microbatch}{packed}"
    return "\n".join([title, *report(shares, rounds=settings.rounds / plans)])


def _columns(rows: Sequence[Sequence[str]], *, left: Collection[int]) -> str:
    return "\n".join(f"  {line}".rstrip() for line in columns(rows, left=left))
