"""The pictures of a report, and the table of sample texts."""

import dataclasses
from collections.abc import Sequence

from matplotlib.figure import Figure

from tap_jax.evaluation import curves, drawing, heat_map
from tap_jax.evaluation.finished import FinishedRun
from tap_jax.evaluation.layouts import MODELS, TASK_LABELS
from tap_jax.evaluation.samples import ImageSample, Sample, TextSample, read_samples
from tap_jax.evaluation.selection import Comparison
from tap_jax.tasks import TASKS

_LONGEST = 160  # characters of a sample text


@dataclasses.dataclass(frozen=True)
class Illustration:
    """One picture; `name` is its file's without folder and ending."""

    name: str
    caption: str
    png: bytes
    runs: tuple[str, ...]


def illustrations(section: Sequence[Comparison], prefix: str = "") -> list[Illustration]:
    """All pictures that the runs of some comparisons allow, at most one comparison per model."""
    found = []

    def add(name: str, caption: str, figure: Figure | None, runs: Sequence[FinishedRun]) -> None:
        if figure is not None:
            ids = tuple(dict.fromkeys(run.id for run in runs))
            found.append(Illustration(prefix + name, caption, drawing.png(figure), ids))

    with drawing.style():
        replacing = [run for comparison in section for run, events in comparison.events(curves.OWN) if events]
        caption = "Figure 3. Number of replacements over federated training"
        add("figure_03", caption, curves.replacements(section), replacing)
        for comparison in section:
            name = MODELS[comparison.model]
            model = comparison.model
            tap = [run for run in comparison.runs if run.config.method == "tap"]
            add(f"figure_04_{model}", f"Figure 4. Replacements by margin, {name}", curves.margins(comparison), tap)
        for comparison in section:
            name, model = MODELS[comparison.model], comparison.model
            chosen = {run.id for runs in comparison.chosen.values() for run in runs}
            for method, backbone in dict.fromkeys(
                (run.config.method, run.config.model.backbone) for run in comparison.runs
            ):
                runs = [
                    run
                    for run in comparison.runs
                    if (run.config.method, run.config.model.backbone) == (method, backbone)
                ]
                runs = [run for run in runs if run.id in chosen]
                if runs:
                    standard = backbone == "standard"
                    add(
                        f"losses_{model}_{method}{'_standard' * standard}",
                        f"Training losses, {name}, {method}{', standard backbone' * standard}",
                        curves.losses(runs),
                        runs,
                    )
            used = [*comparison.chosen.get(("routed", "tap"), ())]
            used += comparison.chosen.get(("routed", heat_map.BASELINE), ())
            caption = f"Gain of TAP over FedAvg + Post-train by client and task, {name}"
            add(f"gains_{model}", caption, heat_map.gain_map(comparison), used)
            run, images = _samples(comparison, ImageSample)
            if run:
                caption = f"Test images and their reconstructions, {name}, {images[0].variant}"
                add(f"images_{model}", caption, _contact_sheet(images), [run])
    return found


def text_samples(section: Sequence[Comparison]) -> list[tuple[str, str, str]]:
    """(title, markdown table, run) of generated texts beside their references, per comparison that has some."""
    found = []
    for comparison in section:
        run, texts = _samples(comparison, TextSample)
        if run:
            lines = ["| Task | Client | Input | Generated | Reference |", "|:--|--:|:--|:--|:--|"]
            previous = None
            for text in texts:
                place = (TASK_LABELS.get(text.task, text.task), str(text.client))
                more = f" *(and {len(text.references) - 1} more)*" if len(text.references) > 1 else ""
                shown = ("", "") if place == previous else place
                previous = place
                generated, reference = _cell(text.generated) or "*(nothing)*", _cell(text.references[0]) + more
                lines.append(f"| {' | '.join((*shown, _cell(text.given), generated, reference))} |")
            title = f"Sample texts, {MODELS[comparison.model]}, {texts[0].variant}"
            found.append((title, "\n".join(lines), run.id))
    return found


def _samples(comparison: Comparison, kind: type[Sample]) -> tuple[FinishedRun | None, list]:
    """The first run that kept such samples, those of TAP before others, and its samples by task and client."""
    for run in sorted(comparison.runs, key=lambda run: run.config.method != "tap"):
        mine = [sample for sample in read_samples(run.folder / "samples") if isinstance(sample, kind)]
        if mine:
            order = [*TASKS, *(sample.task for sample in mine)]
            return run, sorted(mine, key=lambda sample: (order.index(sample.task), sample.client))
    return None, []


def _contact_sheet(images: Sequence[ImageSample]) -> Figure:
    """Per task its targets, and below them what each client's model makes of them."""
    clients: dict[tuple[str, int | str], list[ImageSample]] = {}
    for image in images:
        clients.setdefault((image.task, image.client), []).append(image)
    rows, shown = [], None
    for (task, client), mine in clients.items():
        targets = (task, [image.example for image in mine])
        if targets != shown:  # clients with a common test set share their targets
            rows.append((f"{TASK_LABELS.get(task, task)}\ntarget", [image.target for image in mine]))
            shown = targets
        rows.append((f"client {client}", [image.reconstruction for image in mine]))
    return drawing.pictures(rows)


def _cell(text: str) -> str:
    """Text that stays in its cell."""
    line = " ".join(text.split())
    line = line if len(line) <= _LONGEST else line[: _LONGEST - 1] + "…"
    for character in "\\|<>*_`[]":
        line = line.replace(character, f"\\{character}")
    return line
