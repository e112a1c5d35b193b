"""What the paper's tables look like: captions, lines and columns of Tables 1 to 6 and 8 to 16."""

import dataclasses
from collections.abc import Sequence

from tap_jax.evaluation.scores import AVERAGES, METRICS
from tap_jax.tasks import TASKS

MODELS = {"flava": "FLAVA", "vilt": "ViLT"}
TASK_LABELS = {
    "tiny_imagenet": "Tiny-ImageNet",
    "cifar100": "CIFAR-100",
    "fashion_mnist": "FMNIST",
    "caltech256": "Caltech-256",
    "ag_news": "AG News",
    "mmlu": "MMLU",
    "vqa": "VQA",
    "common_gen": "CommonGen",
}
IMAGE_TASKS = {
    "flava": ("tiny_imagenet", "cifar100", "fashion_mnist", "caltech256"),
    "vilt": ("fashion_mnist", "caltech256"),
}
TEXT_TASKS = ("ag_news", "mmlu", "vqa", "common_gen")
PAPER_TEXT_METRICS = ("bertscore", "meteor")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A line of a table: its label, and the variant on the backbone that fills it."""

    label: str
    variant: str
    backbone: str = "routed"


@dataclasses.dataclass(frozen=True)
class Column:
    """One metric of a task, or the client-weighted mean of several tasks' (Avg.)."""

    label: str
    tasks: tuple[str, ...]
    metric: str


@dataclasses.dataclass(frozen=True)
class Layout:
    """A table of the paper.

    Attributes:
      number: as in the paper.
      heading: of the column of labels.
      models: whose lines it has, in order.
      images: whether it is about the image tasks, or else the text tasks.
    """

    number: int
    caption: str
    heading: str
    models: tuple[str, ...]
    images: bool
    entries: tuple[Entry, ...]

    def columns(self, text_metrics: Sequence[str] = PAPER_TEXT_METRICS) -> tuple[Column, ...]:
        """In the paper's order; `text_metrics` are those that generated text was scored with."""
        tasks = IMAGE_TASKS[self.models[0]] if self.images else TEXT_TASKS
        return columns_of(tasks, text_metrics)


def columns_of(tasks: Sequence[str], text_metrics: Sequence[str]) -> tuple[Column, ...]:
    """A column per task and metric, then the averages over the tasks of a kind."""

    def metrics(task: str) -> Sequence[str]:
        kind = TASKS[task].kind
        return text_metrics if kind == "text_generation" else ("mse",) if kind == "image_generation" else ("accuracy",)

    single = [Column(TASK_LABELS.get(task, task), (task,), metric) for task in tasks for metric in metrics(task)]
    averages = []
    for kind, label in AVERAGES.items():
        of_kind = tuple(task for task in tasks if TASKS[task].kind == kind)
        if len(of_kind) > 1:
            averages += [Column(label, of_kind, metric) for metric in metrics(of_kind[0])]
    return (*single, *averages)


def text_metrics_of(names: Sequence[str]) -> tuple[str, ...]:
    """Those of the metrics that are about generated text, in the registry's order; the paper's where there are none."""
    order = [name for name in METRICS if name not in ("accuracy", "mse")]
    found = {name for name in names if name not in ("accuracy", "mse")}
    known = [name for name in order if name in found]
    return tuple(known + sorted(found.difference(known))) or PAPER_TEXT_METRICS


_OURS = Entry("TAP (Ours)", "tap")
BASELINES = (
    Entry("Local", "local"),
    Entry("FedAvg", "fedavg"),
    Entry("FedAvg + Post-train", "fedavg+post"),
    Entry("Per-FedAvg", "per-fedavg"),
    Entry("Per-FedAvg + Post-train", "per-fedavg+post"),
    Entry("DisentAFL", "disentafl"),
    Entry("DisentAFL + Post-train", "disentafl+post"),
    Entry("FedDAT", "feddat"),
    Entry("FedDAT + Post-train", "feddat+post"),
)
_MAIN = (*BASELINES, _OURS)
_DISTILLATION = (Entry("No KD", "tap-no-kd"), Entry("KD", "tap"))
_LONGER = (Entry("FedAvg + 2·P", "fedavg+2p"), Entry("DisentAFL + 2·P", "disentafl+2p"), _OURS)
_MARGINS = tuple(Entry(label.replace("-", " / "), f"tap@{label}") for label in ("0.01-0.04", "0.02-0.05", "0.05-0.1"))
_STANDARD = (
    *(
        Entry(label, variant, "standard")
        for label, variant in (
            ("FedAvg", "fedavg"),
            ("FedAvg + Post-train", "fedavg+post"),
            ("Per-FedAvg", "per-fedavg"),
            ("Per-FedAvg + Post-train", "per-fedavg+post"),
            ("FedDAT", "feddat"),
            ("FedDAT + Post-train", "feddat+post"),
        )
    ),
    _OURS,
)


def _three(numbers: Sequence[int], captions: Sequence[str], heading: str, entries: tuple[Entry, ...]) -> list[Layout]:
    """The paper's usual trio: images on ViLT, images on FLAVA, text on both."""
    parts = ((("vilt",), True), (("flava",), True), (("flava", "vilt"), False))
    return [
        Layout(number, caption, heading, models, images, entries)
        for number, caption, (models, images) in zip(numbers, captions, parts, strict=True)
    ]


LAYOUTS: tuple[Layout, ...] = (
    *_three(
        (1, 2, 3),
        (
            "Performance comparison for ViLT on image datasets",
            "Performance comparison for FLAVA on image datasets",
            "Performance comparison across FLAVA and ViLT on text datasets",
        ),
        "Method",
        _MAIN,
    ),
    *_three(
        (4, 5, 6),
        [
            f"Knowledge distillation (KD) in the post-training phase {on}"
            for on in ("on image datasets for ViLT", "on image datasets for FLAVA", "on text datasets")
        ],
        "Method",
        _DISTILLATION,
    ),
    *_three(
        (8, 9, 10),
        [
            f"TAP vs. DisentAFL and FedAvg trained for 2·P iterations on {on}"
            for on in ("image tasks for ViLT", "image tasks for FLAVA", "text tasks")
        ],
        "Method",
        _LONGER,
    ),
    *_three(
        (11, 12, 13),
        [
            f"Margins *m*<sub>i,o</sub> for {on}"
            for on in ("image datasets on ViLT", "image datasets on FLAVA", "text datasets")
        ],
        "Margin",
        _MARGINS,
    ),
    *_three(
        (14, 15, 16),
        [
            f"Standard transformer backbone with baselines vs. TAP on {on}"
            for on in ("image datasets for ViLT", "image datasets for FLAVA", "text datasets")
        ],
        "Method",
        _STANDARD,
    ),
)

# Methods beside the paper's, for the table of further runs; others appear under their own names.
FURTHER = {
    "centralised": "Centralised (upper reference)",
    "tap-stage1": "TAP, Stage 1 only",
    "tap-stage2": "TAP, Stage 2 only (no replacement)",
}
