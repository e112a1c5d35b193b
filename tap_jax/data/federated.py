"""From a configuration's data section to what the engine trains on: arrays per task, samples per client."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tap_jax import shipped, templates
from tap_jax.data import clients as natural
from tap_jax.data import loading, synthetic
from tap_jax.data.examples import Examples
from tap_jax.data.partition import assign, by_name
from tap_jax.data.samples import Tell, silent
from tap_jax.data.sampling import ClientData
from tap_jax.data.settings import DataSettings
from tap_jax.data.text import TaskArrays, WordPiece, encode_examples, load_tokenizer
from tap_jax.errors import UserError
from tap_jax.federation import Federation
from tap_jax.tasks import Task

UNKNOWN = 0.01  # part of a task's word pieces that are unknown, from which a line says so
SYNTHETIC_SIZES = {"train": 900, "test": 150}  # samples per task where the configuration names none


@dataclasses.dataclass(frozen=True)
class FederatedData:
    """All data of a run, on the host.

    Attributes:
      train, test: task name -> arrays of the split.
      clients: one `ClientData` per client, ids into `train`.
      personal_tests: per client, task name -> ids into `test`; None where all clients have the common test set. A task
        is missing where the client has no test sample of it.
      tokenizer: None where no task has text.
      notes: lines for the user, about rows that were skipped and texts that were cut.
    """

    train: Mapping[str, TaskArrays]
    test: Mapping[str, TaskArrays]
    clients: tuple[ClientData, ...]
    personal_tests: tuple[Mapping[str, np.ndarray], ...] | None
    tokenizer: WordPiece | None
    notes: tuple[str, ...] = ()

    def samples(self) -> list[dict[str, int]]:
        """Per client, task name -> training samples."""
        found: list[dict[str, int]] = []
        for client in self.clients:
            found.append({})
            for stream, ids in client.streams.items():
                task = stream.partition("/")[0]
                found[-1][task] = found[-1].get(task, 0) + len(ids)
        return found


def build(federation: Federation, tasks: Sequence[Task], settings: DataSettings, tell: Tell = silent) -> FederatedData:
    """Reads, tokenises and deals out the data sets of a federation.

    Args:
      federation: who takes how much of what.
      tasks: the federation's tasks, with the number of classes in use.
      settings: where they are, and how they are read, cut and dealt out.
      tell: see `loading.load`.

    Raises:
      UserError: data that are missing or unusable, a tokenizer that does not fit, a client without samples.
    """
    splits = {split: {task.name: _read(task, split, settings, tell) for task in tasks} for split in ("train", "test")}
    pieces = _tokenizer(splits["train"], settings)
    widths: dict[str, Any] = {name: getattr(settings, name) for name in ("max_text", "max_answer", "too_long")}
    encoded = {
        split: {task.name: encode_examples(found[task.name], pieces, **widths) for task in tasks}
        for split, found in splits.items()
    }
    train, test = encoded["train"], encoded["test"]
    notes = [note for split in splits.values() for found in split.values() for note in found.notes]
    for task in tasks:
        notes += _cut_notes(task, train[task.name], test[task.name], **widths)
        if pieces and (unknown := _unknown(train[task.name], pieces)) >= UNKNOWN:
            notes.append(
                f"data: {task.name}: {100 * unknown:.0f} % of its word pieces are not in data.tokenizer"
                f" '{settings.tokenizer}'; name one that knows its words, or 'train'"
            )
    for name in train:
        train[name], test[name] = _equal_widths(train[name], test[name])

    def kinds(arrays: Mapping[str, TaskArrays]) -> dict[str, np.ndarray]:
        return {name: split.domains if split.labels is None else split.labels for name, split in arrays.items()}

    def deal(split: str, arrays: Mapping[str, TaskArrays]) -> list[dict[str, np.ndarray]]:
        if federation.named:
            names = {name: examples.clients or () for name, examples in splits[split].items()}
            return by_name(federation, names, test=split == "test")
        return assign(
            federation,
            {name: len(split) for name, split in arrays.items()},
            seed=settings.seed,
            labels=kinds(arrays),
            split="share" if settings.natural else settings.split,
            alpha=settings.alpha,
            parts=settings.parts,
            classes_per_client=settings.classes_per_client,
            classes=kinds(train),
        )

    clients = tuple(client_data(tasks, mine, train) for mine in deal("train", train))
    return FederatedData(
        train, test, clients, tuple(deal("test", test)) if settings.personal_test else None, pieces, tuple(notes)
    )


def _unknown(arrays: TaskArrays, pieces: WordPiece) -> float:
    """Part of a training set's word pieces that the tokenizer does not have; 0 where there is no text."""
    texts = [ids for ids in (arrays.tokens, arrays.answers) if ids is not None]
    known = sum(int((ids != pieces.pad_id).sum()) for ids in texts)
    return sum(int((ids == pieces.unk_id).sum()) for ids in texts) / max(known, 1)


def _cut_notes(
    task: Task, train: TaskArrays, test: TaskArrays, max_text: int, max_answer: int, too_long: str
) -> list[str]:
    """A line for a task whose inputs, and one for a task whose answers, are longer than the model takes."""
    middle = too_long == "middle" and templates.is_template(task.source.text)
    lost = "the middle of the question or text in them" if middle else "their end"
    notes = []
    for which, (what, field, limit, loss) in enumerate(
        (("inputs", "max_text", max_text, lost), ("answers", "max_answer", max_answer, "the answers' end"))
    ):
        counts = [split.cut[which] for split in (train, test)]
        if any(counts):
            sizes = (len(train), len(test))
            parts = ", ".join(
                f"{count:,} of {size:,} ({100 * count / size:.0f} %) to {use}"
                for count, size, use in zip(counts, sizes, ("train on", "test on"), strict=True)
            )
            hint = " (data.too_long)" if middle and loss is lost else ""
            notes.append(
                f"data: {task.name}: {parts} have {what} longer than model.{field} = {limit}: {loss} is cut{hint}"
            )
    return notes


def client_data(tasks: Sequence[Task], mine: Mapping[str, np.ndarray], train: Mapping[str, TaskArrays]) -> ClientData:
    """A client's samples by stream.

    Args:
      tasks: of the federation.
      mine: task name -> int64 ids of the client's samples; a task may be missing.
      train: task name -> the arrays that the ids are into.
    """
    streams, tokens, text_tokens = {}, {}, {}
    for task in tasks:
        ids = mine.get(task.name, np.zeros(0, np.int64))
        arrays = train[task.name]
        for number, stream in enumerate(task.streams):
            chosen = ids[arrays.domains[ids] == number]
            if len(chosen):
                streams[stream.name] = chosen
                lengths = arrays.answer_lengths
                tokens[stream.name] = np.ones(len(chosen), np.int32) if lengths is None else lengths[chosen]
                text_tokens[stream.name] = arrays.text_lengths[chosen]
    return ClientData(streams, tokens, text_tokens)


def _equal_widths(*splits: TaskArrays) -> tuple[TaskArrays, ...]:
    """Texts and answers padded to the longest of all splits, so that one program serves them."""

    def padded(split: TaskArrays) -> TaskArrays:
        changes: dict[str, Any] = {}
        for field in ("tokens", "answers"):
            if getattr(split, field) is not None:
                width = max(getattr(other, field).shape[1] for other in splits)
                array = getattr(split, field)
                changes[field] = np.pad(array, ((0, 0), (0, width - array.shape[1])))
        return dataclasses.replace(split, **changes)

    return tuple(map(padded, splits))


def _read(task: Task, split: str, settings: DataSettings, tell: Tell) -> Examples:
    """One split of one task, from wherever it is."""
    limit, placed = settings.size(split), bool(task.source.path)
    if settings.root == "synthetic" and not placed:
        return synthetic.load(task, split, size=limit or SYNTHETIC_SIZES[split], seed=settings.seed)
    drawn = settings.root == "sites"  # with the classes in use
    reduced = bool(settings.image_classes) and task.kind == "image_classification" and not drawn
    known = dataclasses.replace(task, classes=len(task.class_names) or 10**6) if reduced else task
    most = None if reduced else limit or None
    if drawn or settings.natural:
        found = natural.read(known, split, settings, limit=most, tell=tell)
    else:
        found = loading.load(known, split, **settings.place, limit=most, on_bad_row=settings.on_bad_row, tell=tell)
    if reduced and found.labels is not None:
        kept = np.flatnonzero(found.labels < task.classes)
        if len(kept) == 0:
            raise UserError(
                f"data.image_classes: {settings.image_classes} leaves no {split} sample of {task.name}; use more"
            )
        if limit and len(kept) > limit:
            kept = np.sort(np.random.default_rng(0).choice(kept, limit, replace=False))
        found = found.take(kept)
    return found


def _tokenizer(train: Mapping[str, Examples], settings: DataSettings) -> WordPiece | None:
    corpus = [text for split in train.values() for texts in (split.inputs, split.targets) if texts for text in texts]
    if not corpus:
        return None
    source, vocab = settings.tokenizer, settings.vocab
    pieces = load_tokenizer(shipped.located(source), corpus, vocab_size=vocab, cache_dir=settings.cache_dir)
    if source != "train" and pieces.size != vocab:
        raise UserError(f"model.vocab: {vocab}, but the tokenizer '{source}' has {pieces.size} pieces; set it to that")
    if pieces.pad_id != 0:
        raise UserError(f"data.tokenizer: [PAD] of '{source}' is {pieces.pad_id}, not 0; use a BERT tokenizer")
    return pieces
