"""Classes and domains of a task as its training rows have them, where its declaration leaves them open."""

from collections.abc import Mapping, Sequence
from typing import Any

from tap_jax.data import reading, values
from tap_jax.errors import UserError
from tap_jax.tasks import Task

MOST_CLASSES = 10_000  # more different labels are numbers or names of single rows


def classes_of(task: Task, parts: Sequence[reading.Joined]) -> dict[str, Any]:
    """The fields `classes` and `class_names` of a task whose label column says what there is.

    Names are those of the column's `datasets.ClassLabel`; else its texts, sorted; else its whole numbers, where they do
    not simply count from 0.

    Args:
      task: with a source.
      parts: its training rows, in one or several places.

    Raises:
      UserError: labels that are no classes, or places that disagree.
    """
    place, column = f"{task.name}/train, column '{task.source.label}'", task.source.label
    remedy = f"name them in tasks.{task.name}.class_names"
    features = [part.features.get(column) for rows in parts for part in rows.parts]
    named = {tuple(feature.names) for feature in features if hasattr(feature, "names")}
    if len(named) > 1:
        raise UserError(f"{place}: files disagree on the names of classes; {remedy}")
    if named:
        (names,) = named
        return {"classes": len(names), "class_names": names}
    found = _distinct(parts, column)
    if not found:
        raise UserError(f"{place}: no labels; {remedy}")
    if len(found) > MOST_CLASSES:
        raise UserError(f"{place}: {len(found):,} different labels; are they classes? {remedy} if they are")
    if all(isinstance(value, str) for value in found):
        return {"classes": len(found), "class_names": tuple(sorted(found))}
    wrong = [value for value in found if isinstance(value, (str, bytes, list, dict)) or value != int(value)]
    if wrong:
        raise UserError(f"{place}: labels such as {wrong[0]!r} are neither all texts nor all whole numbers; {remedy}")
    numbers = sorted({int(value) for value in found})
    counted = numbers == list(range(len(numbers)))
    return {"classes": len(numbers), "class_names": () if counted else tuple(numbers)}


def domains_of(task: Task, parts: Sequence[reading.Joined]) -> dict[str, Any]:
    """The field `domains` of a task whose domain column says what there is, sorted.

    Raises:
      UserError: no domains, or values that are no names.
    """
    place, column = f"{task.name}/train, column '{task.source.domain_column}'", task.source.domain_column
    found = _distinct(parts, column)
    wrong = [value for value in found if not isinstance(value, str) or "." in value or "/" in value]
    if wrong or not found:
        shown = f"{wrong[0]!r} cannot name blocks" if wrong else "no domains"
        raise UserError(f"{place}: {shown}; set tasks.{task.name}.domains and domain_values")
    return {"domains": tuple(sorted(found))}


def _distinct(parts: Sequence[reading.Joined], column: str) -> Mapping[Any, None]:
    """The values of a column but nulls, each once; a list counts as its repr."""
    found: dict[Any, None] = {}
    for rows in parts:
        for value in rows.columns((column,))[column]:
            if not values.is_null(value):
                found[value if not isinstance(value, (list, dict)) else repr(value)] = None
    return found
