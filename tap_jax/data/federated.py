"""From a configuration's data section to what the engine trains on: arrays per task, samples per client."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from tap_jax import templates
from tap_jax.data import clients as natural
from tap_jax.data import hub, synthetic
from tap_jax.data.examples import Examples
from tap_jax.data.partition import assign, by_name
from tap_jax.data.sampling import ClientData
from tap_jax.data.text import TaskArrays, WordPiece, encode_examples, load_tokenizer
from tap_jax.errors import UserError
from tap_jax.federation import Federation
from tap_jax.tasks import Task

SYNTHETIC_SIZES = {"train": 900, "test": 150}  # samples per task where the configuration names none


@dataclasses.dataclass(frozen=True)
class FederatedData:
    """All data of a run, on the host.

    Attributes:
      train, test: task name -> arrays of the split.
      clients: one `ClientData` per client, ids into `train`.
      personal_tests: per client, task name -> ids into `test`; None where everybody has the common test set. A task is
        missing where the client has no test sample of it.
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


def build(
    federation: Federation,
    tasks: Sequence[Task],
    *,
    root: str,
    seed: int,
    vocab: int,
    max_text: int,
    max_answer: int,
    tokenizer: str = "train",
    sizes: Mapping[str, int] | None = None,
    image_classes: int = 0,
    folders: Mapping[str, str] | None = None,
    cache_dir: str | None = None,
    split: str = "share",
    alpha: float = 0.5,
    parts: int = 0,
    classes_per_client: int = 2,
    client_column: str = "",
    personal_test: bool = False,
    on_bad_row: str = "stop",
    too_long: str = "middle",
) -> FederatedData:
    """Reads, tokenises and deals out the data sets of a federation.

    Args:
      federation: who takes how much of what.
      tasks: the federation's tasks, with the number of classes in use.
      root: "synthetic", "sites", "hub" or a folder; see `hub.load` and `sites`.
      seed: of the synthetic suite and of the split between clients.
      vocab: V; the bound where the tokenizer is trained, else what the tokenizer must have.
      max_text, max_answer: longest input and answer in word pieces.
      tokenizer: "train", a folder or a hub id; see `text.load_tokenizer`.
      sizes: "train" and "test" -> samples per task; 0 or absent for all there are.
      image_classes: keep only labels below this in image classification; 0 for all.
      folders: task name -> sub-folder of `root`, where it is not the task's name.
      cache_dir: of converted sets and trained tokenizers; None keeps nothing.
      split, alpha, parts, classes_per_client: how a set is dealt out; see `partition.assign`. "column" and "folder": as
        the data say, see `clients`; a federation without names then has all in common, by shares.
      client_column: "column" only; says whose a row is.
      personal_test: cut each test set between the clients like its training set.
      on_bad_row: see `hub.load`. too_long: see `text.encode_examples`.

    Raises:
      UserError: data that are missing or unusable, a tokenizer that does not fit, a client without samples.
    """
    sizes = sizes or {}
    splits: dict[str, dict[str, Examples]] = {"train": {}, "test": {}}
    for task in tasks:
        for part, found in splits.items():
            limit = sizes.get(part, 0)
            if root == "synthetic" and not (task.source and task.source.path):
                found[task.name] = synthetic.load(task, part, size=limit or SYNTHETIC_SIZES[part], seed=seed)
            else:
                column = client_column if split == "column" else None if split == "folder" else ""
                found[task.name] = _read(
                    task, part, root, limit, image_classes, folders, cache_dir, on_bad_row, seed, column
                )
    pieces = _tokenizer(tokenizer, splits["train"], vocab, cache_dir)
    encoded = {
        part: {
            task.name: encode_examples(
                task, found[task.name], pieces, max_text=max_text, max_answer=max_answer, too_long=too_long
            )
            for task in tasks
        }
        for part, found in splits.items()
    }
    train, test = encoded["train"], encoded["test"]
    notes = [note for part in splits.values() for found in part.values() for note in found.notes]
    for task in tasks:
        notes += _cut_notes(task, train[task.name], test[task.name], max_text, max_answer, too_long)
    for name in train:
        train[name], test[name] = _equal_widths(train[name], test[name])

    def kinds(arrays):
        return {name: part.domains if part.labels is None else part.labels for name, part in arrays.items()}

    def deal(part, arrays):
        if federation.named:
            names = {name: examples.clients for name, examples in splits[part].items()}
            return by_name(federation, names, test=part == "test")
        return assign(
            federation,
            {name: len(part) for name, part in arrays.items()},
            seed=seed,
            labels=kinds(arrays),
            split="share" if split in ("column", "folder") else split,
            alpha=alpha,
            parts=parts,
            classes_per_client=classes_per_client,
            classes=kinds(train),
        )

    clients = tuple(client_data(tasks, mine, train) for mine in deal("train", train))
    return FederatedData(
        train, test, clients, tuple(deal("test", test)) if personal_test else None, pieces, tuple(notes)
    )


def _cut_notes(
    task: Task, train: TaskArrays, test: TaskArrays, max_text: int, max_answer: int, too_long: str
) -> list[str]:
    """A line for a task whose inputs, and one for a task whose answers, are longer than the model takes."""
    middle = too_long == "middle" and bool(task.source) and templates.is_template(task.source.text)
    lost = "the middle of the question or text in them" if middle else "their end"
    notes = []
    for which, (what, field, limit, loss) in enumerate(
        (("inputs", "max_text", max_text, lost), ("answers", "max_answer", max_answer, "the answers' end"))
    ):
        counts = [part.cut[which] for part in (train, test)]
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
        changes = {}
        for field in ("tokens", "answers"):
            if getattr(split, field) is not None:
                width = max(getattr(other, field).shape[1] for other in splits)
                array = getattr(split, field)
                changes[field] = np.pad(array, ((0, 0), (0, width - array.shape[1])))
        return dataclasses.replace(split, **changes)

    return tuple(map(padded, splits))


def _read(
    task: Task,
    part: str,
    root: str,
    limit: int,
    image_classes: int,
    folders: Mapping[str, str] | None,
    cache_dir: str | None,
    on_bad_row: str,
    seed: int,
    column: str | None,
) -> Examples:
    """`column`: says whose a row is; None where each folder is a client's, "" where nothing does."""
    reduced = bool(image_classes) and task.kind == "image_classification"
    drawn = root == "sites"  # with the classes in use
    reduced = reduced and not drawn
    known = dataclasses.replace(task, classes=len(task.class_names) or 10**6) if reduced else task
    folders = {name: folder for name, folder in (folders or {}).items() if folder}
    given = {"root": root, "folders": folders, "cache_dir": cache_dir, "on_bad_row": on_bad_row}
    given["limit"] = None if reduced else limit or None
    if drawn or column != "":
        found = natural.read(known, part, column=column or "", seed=seed, **given)
    else:
        found = hub.load(known, part, **given)
    if reduced:
        kept = np.flatnonzero(found.labels < task.classes)
        if len(kept) == 0:
            raise UserError(f"data.image_classes: {image_classes} leaves no {part} sample of {task.name}; use more")
        if limit and len(kept) > limit:
            kept = np.sort(np.random.default_rng(0).choice(kept, limit, replace=False))
        found = found.take(kept)
    return found


def _tokenizer(source: str, train: Mapping[str, Examples], vocab: int, cache_dir: str | None) -> WordPiece | None:
    corpus = [text for part in train.values() for texts in (part.inputs, part.targets) if texts for text in texts]
    if not corpus:
        return None
    pieces = load_tokenizer(source, corpus, vocab_size=vocab, cache_dir=cache_dir)
    if source != "train" and pieces.size != vocab:
        raise UserError(f"model.vocab: {vocab}, but the tokenizer '{source}' has {pieces.size} pieces; set it to that")
    if pieces.pad_id != 0:
        raise UserError(f"data.tokenizer: [PAD] of '{source}' is {pieces.pad_id}, not 0; use a BERT tokenizer")
    return pieces
