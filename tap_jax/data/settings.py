"""What a run's data are made of: the data section of a configuration, and what of the other sections they depend on."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """One record for all that reads, tokenises and deals out data.

    Attributes:
      root: "synthetic", "sites", "hub", a data set there, or a folder; see `loading.load` and `sites`.
      seed: of the synthetic suite and of the split between clients.
      vocab: V; the bound where the tokenizer is trained, else what the tokenizer must have.
      max_text, max_answer: longest input and answer in word pieces.
      tokenizer: "train", a folder or a hub id; see `text.load_tokenizer`.
      train_size, test_size: samples per task, of all clients together; 0 for all there are.
      image_classes: keep only labels below this in image classification; 0 for all.
      cache_dir: of converted sets and trained tokenizers; None keeps nothing.
      split, alpha, parts, classes_per_client: how a set is dealt out; see `partition.assign`.
      natural: the data say who the clients are, by a "column" or a "folder" each (`split`); see `clients`. A federation
        without names then has all in common, by shares.
      client_column: "column" only; says whose a row is.
      tasks: names of those to take where the data say who the clients are; () for all whose data are there.
      held_out: part of each client's training samples that is left out of training.
      personal_test: cut each test set between the clients like its training set.
      on_bad_row: see `loading.load`. too_long: see `text.encode_examples`.
    """

    root: str
    seed: int
    vocab: int
    max_text: int
    max_answer: int
    tokenizer: str
    train_size: int
    test_size: int
    image_classes: int
    cache_dir: str | None
    split: str
    natural: bool
    alpha: float
    parts: int
    classes_per_client: int
    client_column: str
    tasks: tuple[str, ...]
    held_out: float
    personal_test: bool
    on_bad_row: str
    too_long: str

    def size(self, split: str) -> int:
        """Samples per task of a split, 0 for all."""
        return {"train": self.train_size, "test": self.test_size}[split]

    @property
    def place(self) -> dict[str, Any]:
        """Where rows are: arguments of `places.rows_of`."""
        return {"root": self.root, "cache_dir": self.cache_dir}
