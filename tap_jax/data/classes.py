"""Classes and domains of a task as its training rows have them, where its declaration leaves them open."""

from collections.abc import Mapping, Sequence
from typing import Any

from tap_jax.data import reading, values
from tap_jax.errors import UserError
from tap_jax.tasks import Task, can_name_blocks

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
    features: list[Any] = [part.features.get(column) for rows in parts for part in rows.parts]
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
    texts = {value.strip() for value in found if isinstance(value, str)}
    read = {values.number(text) for text in texts}  # csv files have numbers as texts
    if len(texts) == len({str(value).strip() for value in found}) and any(isinstance(value, str) for value in read):
        return {"classes": len(texts), "class_names": tuple(sorted(texts))}
    read |= {value for value in found if not isinstance(value, str)}
    wrong = [value for value in read if not isinstance(value, (int, float)) or value != int(value)]
    if wrong:
        raise UserError(
            f"{place}: labels such as {wrong[0]!r:.60} are neither all texts nor all whole numbers; {remedy}"
        )
    numbers = sorted({int(value) for value in read})
    counted = numbers == list(range(len(numbers)))
    return {"classes": len(numbers), "class_names": () if counted else tuple(numbers)}


def domains_of(task: Task, parts: Sequence[reading.Joined]) -> dict[str, Any]:
    """The field `domains` of a task whose domain column says what there is, sorted.

    Raises:
      UserError: no domains, or values that are no names.
    """
    place, column = f"{task.name}/train, column '{task.source.domain_column}'", task.source.domain_column
    found = _distinct(parts, column)
    names = {str(value).strip() for value in found}
    wrong = [name for name in names if not can_name_blocks(name)]
    if wrong or not found:
        shown = f"{wrong[0]!r} cannot name a domain" if wrong else "no domains"
        raise UserError(f"{place}: {shown}; set tasks.{task.name}.domains and domain_values")
    return {"domains": tuple(sorted(names))}


def _distinct(parts: Sequence[reading.Joined], column: str) -> Mapping[Any, None]:
    """The values of a column but nulls, each once."""
    found: dict[Any, None] = {}
    for rows in parts:
        for value in rows.columns((column,))[column]:
            if isinstance(value, (list, dict)):
                raise UserError(
                    f"{rows.parts[0].place}, column '{column}': a list or record where one value is expected"
                )
            if not values.is_null(value):
                found[value] = None
    return found
