"""The procedural suite: eight small tasks that need no download, shaped like the eight data sets of the paper.

Same names, columns, templates and answers as the real sets, drawn by rules (`pictures`, `grammar`): sized so that a
transformer of width 32-64 learns them from a few hundred samples, and gains from more than the few dozen that one
client holds. Train and test never share a sample: texts are divided by a hash of the text, and every picture
carries per-pixel noise from its split's own random stream.

A task of one's own joins the suite with a rule: `register_task` in `tap_jax.tasks`, and an entry in `RULES` here.
"""

import functools
import zlib
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from tap_jax.data import grammar
from tap_jax.data.examples import Examples
from tap_jax.data.pictures import PICTURES
from tap_jax.errors import UserError
from tap_jax.tasks import Task

SPLITS = ("train", "test")
_TEST_PART = 4  # every fourth text, by its hash, belongs to the test split
_MOST_IN_VAIN = 10_000  # draws in a row that give no new record: the rules know no more
Record = TypeVar("Record")
_CHUNK = 500  # pictures drawn at once; bounds the memory of a large split


def load(task: Task, split: str, *, size: int, seed: int) -> Examples:
    """Draws one split of one task.

    Args:
      task: one of `RULES`; for the paper's eight, `task.classes` may be any number up to 200 (pictures) or 4 (news).
      split: "train" or "test"; the two are disjoint for every size, under one seed.
      size: N. For common_gen's test split the number of concept sets (about 800 exist), each with several references.
      seed: the split is a pure function of (task, split, size, seed).

    Raises:
      UserError: a task without a rule in `RULES`, more classes than it can tell apart, or more samples than it has.

    Example:
      >>> from tap_jax.tasks import find_task
      >>> load(find_task("common_gen"), "train", size=1, seed=0).inputs[0].split("Concepts: ")[1]
      'school, boy, jump'
    """
    if split not in SPLITS:
        raise UserError(f"split: unknown '{split}'; use one of {', '.join(SPLITS)}")
    if task.name not in RULES:
        remedy = f"set tasks.{task.name}.path or data.root to its files"
        where = remedy if task.source.needed else f"known: {', '.join(RULES)}"
        raise UserError(f"data.root: no synthetic data for task {task.name}; {where}")
    if size < 1:
        raise UserError(f"data.{split}_size: {size} of {task.name}; use at least 1")
    rng = np.random.default_rng([seed, zlib.crc32(task.name.encode()), SPLITS.index(split)])
    return RULES[task.name](task, split, rng, size)


def _in_chunks(draw: Callable, task: Task, split: str, rng: np.random.Generator, size: int) -> Examples:
    """Pictures that `draw` draws; noise from the split's own stream keeps the splits apart."""
    return Examples.joined([draw(task, rng, min(_CHUNK, size - start)) for start in range(0, size, _CHUNK)])


def _collect(draw: Callable[[int], tuple[str, str, Record]], task: Task, split: str, size: int) -> list[Record]:
    """The first `size` different records that fall in `split`.

    Args:
      draw: number of records so far -> (text whose hash decides the split, text that tells records apart, record).
      task: named in the error.
      split: "train" or "test".
      size: how many.
    """
    kept: list[Record] = []
    seen, in_vain = set(), 0
    while len(kept) < size:
        key, identity, record = draw(len(kept))
        in_vain += 1
        if (zlib.crc32(key.encode()) % _TEST_PART == 0) == (split == "test") and identity not in seen:
            seen.add(identity)
            kept.append(record)
            in_vain = 0
        if in_vain > _MOST_IN_VAIN:
            raise UserError(
                f"data.{split}_size: {size} of {task.name}, but the rules give about {len(kept)}; use fewer"
            )
    return kept


def _news(task: Task, split: str, rng: np.random.Generator, size: int) -> Examples:
    """ag_news: the topic of a headline."""
    if task.classes > 4:
        raise UserError(f"classes: {task.name} has 4 topics, not {task.classes}; lower it")

    def draw(number: int) -> tuple[str, str, dict]:
        record = grammar.news(rng, number % task.classes)
        return record["text"], record["text"], record

    records = _collect(draw, task, split, size)
    records = [records[i] for i in rng.permutation(size)]
    labels = np.array([record["label"] for record in records], np.int32)
    domains = np.zeros(size, np.int32)
    return Examples(domains, inputs=tuple(record["text"] for record in records), labels=labels)


def _multiple_choice(task: Task, split: str, rng: np.random.Generator, size: int) -> Examples:
    """mmlu: questions on the task's domains, as many on each."""
    known = grammar.QUESTION_DOMAINS
    unknown = [domain for domain in task.domains if domain not in known]
    if unknown:
        raise UserError(f"task {task.name}: no synthetic questions on {', '.join(unknown)}; use {', '.join(known)}")

    def draw(number: int) -> tuple[str, str, tuple[int, str, str]]:
        domain = number % len(task.domains)
        record = grammar.question(rng, task.domains[domain])
        source, target = task.source.written(record)
        return source, source, (domain, source, target)

    records = _collect(draw, task, split, size)
    domains, inputs, targets = zip(*(records[i] for i in rng.permutation(size)), strict=True)
    references = tuple((target,) for target in targets)
    return Examples(np.array(domains, np.int32), inputs=inputs, targets=targets, references=references)


def _concepts(task: Task, split: str, rng: np.random.Generator, size: int) -> Examples:
    """common_gen: a sentence from concepts; a test sample is a whole concept set with all its references."""

    def draw(number: int) -> tuple[str, str, tuple[str, tuple[str, ...]]]:
        record = grammar.scene(rng)
        sentences = [record["target"], *record["others"]]
        pairs = [task.source.written({**record, "target": sentence}) for sentence in sentences]
        source, targets = pairs[0][0], tuple(target for _, target in pairs)
        concepts = " ".join(sorted(record["concepts"]))
        if split == "test":
            return concepts, concepts, (source, targets)
        return concepts, concepts + targets[0], (source, targets[:1])

    inputs, references = zip(*_collect(draw, task, split, size), strict=True)
    targets = tuple(group[0] for group in references)
    return Examples(np.zeros(size, np.int32), inputs=inputs, targets=targets, references=references)


# (task, split, rng, N) -> N samples. The rng is the split's own; what must not be in both splits the rule keeps apart.
Rule = Callable[[Task, str, np.random.Generator, int], Examples]
RULES: dict[str, Rule] = {
    **{name: functools.partial(_in_chunks, draw) for name, draw in PICTURES.items()},
    "ag_news": _news,
    "mmlu": _multiple_choice,
    "common_gen": _concepts,
}
