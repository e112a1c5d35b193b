"""Where the eight data sets live: hub ids, configurations, splits, columns and local stand-ins, in one table.

A ninth task with public data needs one more entry here (and, if it generates text, one in `templates`).
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a task's data are on the hub and what their columns are called.

    Attributes:
      hub_id: repository of the data set.
      train, test: names of its splits. The same name twice: that split is divided, see `divide_by_image`.
      image, label: column names, where the task has them.
      columns: further columns, by the names that the template reads.
      configs: configurations to put one after the other; none for the default one.
      stand_ins: local folders to use where the task's own is absent, in this order.
    """

    hub_id: str
    train: str
    test: str
    image: str | None = None
    label: str | None = None
    columns: tuple[str, ...] = ()
    configs: tuple[str, ...] = ()
    stand_ins: tuple[str, ...] = ()

    @property
    def needed(self) -> tuple[str, ...]:
        """All columns that are read."""
        return tuple(name for name in (self.image, self.label, *self.columns) if name)


SOURCES: dict[str, Source] = {
    "tiny_imagenet": Source("zh-plus/tiny-imagenet", "train", "valid", "image", "label"),
    "cifar100": Source("uoft-cs/cifar100", "train", "test", "img", "fine_label"),
    "fashion_mnist": Source("zalando-datasets/fashion_mnist", "train", "test", "image"),
    "caltech256": Source("ilee0022/Caltech-256", "train", "test", "image", stand_ins=("caltech101",)),
    "ag_news": Source("fancyzhx/ag_news", "train", "test", label="label", columns=("text",)),
    "mmlu": Source(
        "cais/mmlu",
        "test",
        "validation",
        columns=("question", "subject", "choices", "answer"),
        configs=("professional_law", "professional_medicine", "moral_scenarios"),
    ),
    "vqa": Source(
        "merve/vqav2-small",
        "validation",
        "validation",
        "image",
        columns=("question", "multiple_choice_answer"),
        stand_ins=("easy_vqa", "vqav2"),
    ),
    "common_gen": Source(
        "allenai/common_gen", "train", "validation", columns=("concept_set_idx", "concepts", "target")
    ),
}
MMLU_DOMAINS = {"professional_law": "law", "professional_medicine": "medicine", "moral_scenarios": "moral"}
