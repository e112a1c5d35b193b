"""Open question 3: what more modality-task pairs cost the server, and whether TAP keeps its lead.

A federation of P pairs has P/4 data sets of each of the four kinds of task, every one with a decoder and a domain of
its own, so that a pair is a task. The first of a kind is the embedded suite's; the others are the suite's in disguise
(see `disguised`), as hard as the first, but not the same: what a colour or a word stands for differs.

Fixed: clients per pair, samples per client, rounds, the part of the clients that takes part in a round (so how often a
client does), the model. Not fixed, because it cannot be: with the pairs grow the clients, hence the cohort and the data
behind what pairs share (encoders, the experts of a kind). The first six clients are in every federation, with the same
data; they are reported by themselves, too.

The server's loss is of samples that each client holds out from its training set; TAP and FedAvg + Post-train are
compared by their scores on the test sets, as in the paper.
"""

import argparse
import csv
import dataclasses
import io
import math
import pathlib
import re
import time
import zlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from tap_jax.cli import startup
from tap_jax.config import ConfigDict, config_hash, load_config
from tap_jax.data import synthetic
from tap_jax.engine.cohort import client_batches
from tap_jax.evaluation import drawing
from tap_jax.tasks import find_task, register_task
from tap_jax.whole_files import write_file

# One task of each kind; the data sets of one number make up six clients: four with one task, two with two.
KINDS = {
    "tiny_imagenet": "image classification",
    "caltech256": "image reconstruction",
    "ag_news": "text classification",
    "common_gen": "text generation",
}
PATTERNS = (
    ("tiny_imagenet",), ("caltech256",), ("ag_news",), ("common_gen",), ("tiny_imagenet", "ag_news"),
    ("caltech256", "common_gen"),
)  # fmt: skip
SHARE = 0.5  # each task has two clients
TAKE_PART = 0.5  # of the clients, in each round
VARIANTS = ("tap", "fedavg", "fedavg+post")
LOSS = "held-out loss"  # nats; of image reconstruction the MSE
SCORES = ("accuracy", "mse", "meteor", "meteor_exact_stem")  # the last where WordNet is absent
FIELDS = {"data.train_size": 320, "data.test_size": 60, "data.held_out": 0.2}
# Words are ciphers and pictures are negatives here: what the demo's checkpoint knows would serve the first task of each
# kind alone.
FIELDS |= {"model.weights": "", "data.tokenizer": "train", "model.vocab": 1000}
ROUNDS = 12
SMOKE = {"pairs": [4, 8], "seeds": [41], "rounds": 1}
COLORS = (drawing.ORANGE, drawing.GREEN, drawing.BLUE, drawing.PURPLE)


@dataclasses.dataclass(frozen=True)
class Value:
    """One number about one client and task."""

    pairs: int
    seed: int
    client: int
    task: str
    kind: str
    variant: str
    metric: str
    value: float


def main(arguments: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--config", default="configs/demo.py", help="model and training; sizes are set here")
    options.add_argument("--pairs", type=int, nargs="+", default=[4, 8, 16, 32], help="multiples of 4")
    options.add_argument("--seeds", type=int, nargs="+", default=[41, 42])
    options.add_argument("--rounds", type=int, default=ROUNDS)
    options.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/scaling"))
    options.add_argument("--smoke", action="store_true", help="two federations, one round: does it run at all?")
    chosen = options.parse_args(arguments)
    if chosen.smoke:
        vars(chosen).update(SMOKE)
    if any(pairs < 1 or pairs % len(KINDS) for pairs in chosen.pairs):
        options.error(f"--pairs: {' '.join(map(str, chosen.pairs))}; use multiples of {len(KINDS)}")
    pairs = sorted(set(chosen.pairs))
    rows = [rows_of(number) for number in range(max(pairs) // len(KINDS))]  # and with them all tasks are registered
    started, found = False, []
    chosen.out.mkdir(parents=True, exist_ok=True)
    for seed in chosen.seeds:
        for count in pairs:
            config = configured(chosen, sum(rows[: count // len(KINDS)], ()), seed)
            done = chosen.out / f"pairs{count:02}_seed{seed}_{config_hash(config)[:12]}.csv"
            if not done.exists():
                if not started:
                    startup.start_jax(config)
                    started = True
                begun = time.perf_counter()
                write_file(done, as_csv(played(config, count)))
                print(f"{count} pairs, seed {seed}: {time.perf_counter() - begun:.0f} s", flush=True)
            found += from_csv(done.read_text())
    write_file(chosen.out / "scaling.csv", as_csv(found))
    write_file(chosen.out / "scaling.png", drawn(found))
    print(summary(found), end="")
    print(f"in {chosen.out}: scaling.csv, scaling.png")


# --- the federations ------------------------------------------------------------------------------------------------


def rows_of(number: int) -> tuple[dict[str, float], ...]:
    """The client table of the data sets of one number: task -> share, per client."""
    names = {base: base if number == 0 else disguised(base, number + 1) for base in KINDS}
    return tuple({names[base]: SHARE for base in pattern} for pattern in PATTERNS)


def disguised(base: str, number: int) -> str:
    """Registers a further data set of the suite -> its name, "ag_news_2" for instance.

    Pictures are turned, mirrored, made negative and their colours exchanged; in texts each word stands for another.
    Both are fixed by the name, the same for all its samples and seeds, and can be undone, so that there is as much to
    learn as before.
    """
    name, task = f"{base}_{number}", find_task(base)
    register_task(dataclasses.replace(task, name=name, domains=(name,), head=name))
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    turns, mirror, negative, channels = rng.integers(4), rng.integers(2), rng.integers(2), rng.permutation(3)
    words = vocabulary(base) if "text" in task.modalities else []
    cipher = dict(zip(words, rng.permutation(words).tolist(), strict=True))

    def picture(images):
        images = np.rot90(images, turns, axes=(1, 2))[..., channels]
        images = images[:, :, ::-1] if mirror else images
        return np.ascontiguousarray(255 - images if negative else images)

    def text(given: str) -> str:
        return WORD.sub(lambda found: cipher.get(found[0], found[0]), given)

    def rule(task, split, rng, size):
        plain = synthetic.RULES[base](task, split, rng, size)
        changes = {} if plain.images is None else {"images": picture(plain.images)}
        for field in ("inputs", "targets"):
            if getattr(plain, field) is not None:
                changes[field] = tuple(map(text, getattr(plain, field)))
        if plain.references is not None:
            changes["references"] = tuple(tuple(map(text, group)) for group in plain.references)
        return dataclasses.replace(plain, **changes)

    synthetic.RULES[name] = rule
    return name


WORD = re.compile(r"\b[a-z]+\b")


def vocabulary(base: str) -> list[str]:
    """The words of a text task, of both splits, sorted; capitalised ones belong to the template and stay."""
    drawn = [synthetic.load(find_task(base), split, size=600, seed=0) for split in synthetic.SPLITS]
    texts = [text for examples in drawn for text in (*examples.inputs, *(examples.targets or ()))]
    return sorted({word for text in texts for word in WORD.findall(text)})


def configured(chosen, rows: Sequence[dict[str, float]], seed: int) -> ConfigDict:
    """One federation's configuration."""
    fields = FIELDS | {"federation.table": "custom", "federation.rows": tuple(rows), "federation.groups": 1}
    fields |= {"seed": seed, "rounds": chosen.rounds, "cohort_size": max(1, round(TAKE_PART * len(rows)))}
    return load_config(chosen.config, fields | {"method": "tap", "variants": VARIANTS})


def played(config: ConfigDict, pairs: int) -> list[Value]:
    """All rounds and last phases of one federation -> losses of the server, scores of everybody."""
    from tap_jax import experiment  # after JAX has its devices

    built = experiment.build(config)
    state = built.init()
    for _ in range(config.rounds):
        state, _ = built.round(state)
    rows = built.evaluate_server("fedavg", state)
    for cohort, variant, models in built.finish_in_batches(state):
        rows += built.evaluate_cohort(variant, cohort, models)
    rows = [row for row in rows if row["metric"] in SCORES]
    for cohort in client_batches(built.engine, config.rounds):
        losses = np.asarray(cohort.held_out_loss(cohort.broadcast(state.server)))
        for client, of_tasks in zip(cohort.clients, losses, strict=True):
            for task in built.federation.tasks_of(client) if client >= 0 else ():
                loss = of_tasks[built.federation.tasks.index(task)]
                rows.append({"variant": "fedavg", "client": client, "task": task.name, "metric": LOSS, "value": loss})
    return [
        Value(pairs, config.seed, int(row["client"]), row["task"], kind_of(row["task"]), row["variant"], row["metric"],
              math.nan if row["value"] is None else float(row["value"]))
        for row in built.in_order(rows)
    ]  # fmt: skip


def kind_of(task: str) -> str:
    return KINDS[re.sub(r"_\d+$", "", task)]


# --- what came of it ------------------------------------------------------------------------------------------------


def as_csv(found: Iterable[Value]) -> str:
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, [field.name for field in dataclasses.fields(Value)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(dataclasses.asdict, found))
    return stream.getvalue()


def from_csv(text: str) -> list[Value]:
    types = {field.name: field.type for field in dataclasses.fields(Value)}
    rows = csv.DictReader(io.StringIO(text))
    return [Value(**{name: types[name](value) for name, value in row.items()}) for row in rows]


# kind -> float [n, 4], a line per seed, client and task: the server's loss and score, FedAvg + Post-train's, TAP's.
Table = dict[str, np.ndarray]
COLUMNS = {
    "server's loss": ("fedavg", True),
    "server's score": ("fedavg", False),
    "FedAvg + Post-train": ("fedavg+post", False),
    "TAP": ("tap", False),
}


def table(found: Sequence[Value], pairs: int, *, common: bool = False) -> Table:
    """All numbers of the federations of so many pairs; `common`: only of the clients that are in every federation."""
    lines: dict[str, dict[tuple, dict[tuple, float]]] = {kind: {} for kind in KINDS.values()}
    for one in found:
        if one.pairs == pairs and (not common or one.client < len(PATTERNS)):
            place = one.seed, one.client, one.task
            lines[one.kind].setdefault(place, {})[one.variant, one.metric == LOSS] = one.value
    return {
        kind: np.array([[cells[column] for column in COLUMNS.values()] for cells in mine.values()])
        for kind, mine in lines.items()
    }


def server_loss(values: Table, first: Table) -> np.ndarray:
    """Per kind, the server's mean loss over that of the smallest federation."""
    return np.array([values[kind][:, 0].mean() / first[kind][:, 0].mean() for kind in values])


def gain(values: Table, first: Table) -> np.ndarray:
    """Per kind, TAP's mean score over FedAvg + Post-train's; of MSE the inverse, so that more than 1 is better."""
    ratio = {kind: lines[:, 3].mean() / lines[:, 2].mean() for kind, lines in values.items()}
    return np.array([1 / ratio[kind] if kind == KINDS["caltech256"] else ratio[kind] for kind in values])


def overall(ratios: np.ndarray) -> float:
    """The geometric mean of the kinds' ratios."""
    return float(np.exp(np.log(ratios).mean()))


def interval(statistic: Callable, values: Table, first: Table, draws: int = 1000) -> tuple[float, float]:
    """95 % bootstrap interval of the overall ratio: lines are drawn anew within each kind, all numbers of one together.

    Clients of one seed share a server, so it says less than as many independent federations would.
    """
    rng = np.random.default_rng(0)

    def again(table: Table) -> Table:
        return {kind: lines[rng.integers(len(lines), size=len(lines))] for kind, lines in table.items()}

    found = []
    for _ in range(draws):
        mine = again(values)
        found.append(overall(statistic(mine, mine if values is first else again(first))))
    low, high = np.quantile(found, (0.025, 0.975))
    return float(low), float(high)


def summary(found: Sequence[Value]) -> str:
    """Means by kind, the server's loss against the smallest federation's, TAP's score against FedAvg + Post-train's."""
    pairs, seeds = (sorted({getattr(one, name) for one in found}) for name in ("pairs", "seed"))
    first = table(found, pairs[0])
    scores = ", ".join(name for name in SCORES if any(one.metric == name for one in found))
    lines = [f"Means over clients, their tasks and seeds {', '.join(map(str, seeds))}; scores: {scores}"]
    lines.append(f"{'pairs':>5}  {'':<20}" + "".join(f"{kind:>22}" for kind in KINDS.values()))
    for count in pairs:
        values = table(found, count)
        for column, name in enumerate(COLUMNS):
            means = "".join(f"{mine[:, column].mean():22.4f}" for mine in values.values())
            lines.append(f"{count:5}  {name:<20}{means}")
    lines.append("Geometric means over kinds [95 % bootstrap over clients' tasks]")
    for count in pairs:
        values = table(found, count)
        shown = []
        for statistic in (server_loss, gain):
            low, high = interval(statistic, values, first)
            shown.append(f"{overall(statistic(values, first)):.3f} [{low:.3f}, {high:.3f}]")
        lines.append(
            f"{count:5} pairs: server's loss {shown[0]} times that with {pairs[0]}; TAP's score {shown[1]} times"
            " FedAvg + Post-train's"
        )
    return "\n".join(lines) + "\n"


def drawn(found: Sequence[Value]) -> bytes:
    """The figure as PNG: the server's loss against pairs, and TAP's gain over FedAvg + Post-train."""
    pairs, seeds = (sorted({getattr(one, name) for one in found}) for name in ("pairs", "seed"))
    everybody, common = ([table(found, count, common=common) for count in pairs] for common in (False, True))
    with drawing.style():
        figure, axes = drawing.new_figure(1, 2, width=10, height=4.4)
        for axis, statistic, label in (
            (axes[0, 0], server_loss, f"server's held-out loss, change from {pairs[0]} pairs"),
            (axes[0, 1], gain, "TAP's score against FedAvg + Post-train's"),
        ):
            ratios = np.array([statistic(values, everybody[0]) for values in everybody])
            for kind, color, line in zip(KINDS.values(), COLORS, ratios.T, strict=False):
                axis.plot(pairs, 100 * line - 100, "o-", color=color, linewidth=1, markersize=3, label=kind)
            shared = [overall(statistic(values, common[0])) for values in common]
            label_shared = "all kinds, the six clients of all federations"
            axis.plot(pairs, 100 * np.array(shared) - 100, "s--", color=drawing.GREY, markersize=4, label=label_shared)
            middle = np.array(list(map(overall, ratios)))
            ends = np.array([interval(statistic, values, everybody[0]) for values in everybody])
            for seed in seeds if len(seeds) > 1 else ():
                mine = [one for one in found if one.seed == seed]
                first = table(mine, pairs[0])
                dots = [100 * overall(statistic(table(mine, count), first)) - 100 for count in pairs]
                axis.plot(pairs, dots, "x", color=drawing.BLACK, markersize=6, label="all kinds, one seed")
            axis.errorbar(
                pairs, 100 * middle - 100, yerr=100 * np.abs(ends - middle[:, None]).T, fmt="o-", color=drawing.BLACK,
                linewidth=2, capsize=3, label="all kinds (geometric mean)",
            )  # fmt: skip
            axis.axhline(0, color="#555555", linewidth=0.8)
            axis.set_xscale("log", base=2)
            axis.set_xticks(pairs, [str(count) for count in pairs])
            axis.minorticks_off()
            axis.yaxis.set_major_formatter("{x:+g} %")
            axis.set_xlabel("modality–task pairs")
            axis.set_title(label)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        labels, handles = zip(*dict(zip(labels, handles, strict=True)).items(), strict=True)  # one line for all seeds
        title = f"{len(seeds)} seed{'s' * (len(seeds) > 1)}; bars: 95 % bootstrap over clients' tasks"
        figure.legend(handles, labels, loc="outside upper center", ncols=3, title=title)
        return drawing.png(figure)


if __name__ == "__main__":
    main()
