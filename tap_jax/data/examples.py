"""One split of one task as it comes from its source, before tokenisation: the `Examples` record.

Every source (the procedural suite, a folder of files, the hub) ends in this one record, and everything
after it (word pieces, streams, device arrays) starts from it. Images stay uint8 [64, 64, 3]; texts stay strings,
already cut by the task's template into what the model reads and what it must write.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

IMAGE_SIDE = 64
PER_SAMPLE = ("domains", "images", "inputs", "labels", "targets", "references", "shorten", "clients")


@dataclasses.dataclass(frozen=True)
class Examples:
    """N samples of one split of one task.

    A classification task has `labels`; a text_generation task has `targets` and `references`; an
    image_generation task has neither, its target is the image itself.

    Attributes:
      domains: int32 [N], index into `task.domains`.
      images: uint8 [N, 64, 64, 3] RGB, for tasks with the image modality.
      inputs: N texts, for tasks with the text modality: the template up to where the answer starts.
      labels: int32 [N], classification only.
      targets: N texts, text_generation only: what the decoder must write.
      references: text_generation only: per sample one or more acceptable outputs, the target first.
      clients: N names, whose each sample is; None where the data name no clients.
      shorten: int32 [N, 2], where the part of an input begins and ends, in characters, that gives way where the whole
        is too long for the model: a question, say, and not the options after it. None: the end of the input does.
      notes: lines for the user, about rows that were skipped.

    Raises:
      ValueError: lengths, shapes or dtypes disagree with the above.

    Example:
      >>> news = Examples(np.zeros(2, np.int32), inputs=("a", "b"), labels=np.array([3, 1], np.int32))
      >>> len(news), news.take([1]).inputs
      (2, ('b',))
    """

    domains: np.ndarray
    images: np.ndarray | None = None
    inputs: tuple[str, ...] | None = None
    labels: np.ndarray | None = None
    targets: tuple[str, ...] | None = None
    references: tuple[tuple[str, ...], ...] | None = None
    clients: tuple[str, ...] | None = None
    shorten: np.ndarray | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in PER_SAMPLE:
            value = getattr(self, name)
            if value is not None and len(value) != len(self.domains):
                raise ValueError(f"{name} has {len(value)} entries, domains has {len(self.domains)}")
        for name in ("domains", "labels"):
            value = getattr(self, name)
            if value is not None and (value.ndim != 1 or value.dtype != np.int32):
                raise ValueError(f"{name} must be int32 [N], not {value.dtype} {list(value.shape)}")
        expected = (IMAGE_SIDE, IMAGE_SIDE, 3)
        if self.images is not None and (self.images.shape[1:] != expected or self.images.dtype != np.uint8):
            raise ValueError(f"images must be uint8 [N, 64, 64, 3], not {self.images.dtype} {list(self.images.shape)}")
        if (self.targets is None) != (self.references is None):
            raise ValueError("targets and references come together")
        if self.references is not None and not all(self.references):
            raise ValueError("every sample needs at least one reference")

    def __len__(self) -> int:
        return len(self.domains)

    def take(self, ids: Sequence[int] | np.ndarray) -> "Examples":
        """The samples `ids` (int [M], repeats allowed), in that order."""
        ids = np.asarray(ids, dtype=np.int64)
        taken: dict[str, Any] = {"notes": self.notes}
        for name in PER_SAMPLE:
            value = getattr(self, name)
            if isinstance(value, np.ndarray):
                taken[name] = value[ids]
            elif value is not None:
                taken[name] = tuple(value[i] for i in ids)
        return Examples(**taken)

    @classmethod
    def joined(cls, parts: Sequence["Examples"]) -> "Examples":
        """The samples of the parts, one part after the other; what the first part lacks, all lack."""
        found: dict[str, Any] = {}
        for name in (*PER_SAMPLE, "notes"):
            values = [getattr(part, name) for part in parts]
            if isinstance(values[0], np.ndarray):
                found[name] = np.concatenate(values)
            elif values[0] is not None:
                found[name] = tuple(entry for value in values for entry in value)
        return cls(**found)
