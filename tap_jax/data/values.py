"""Single values of a row, of whatever type the files have: labels, texts, and what a template is given.

Each is converted rightly, or it is a `BadRow` that names task, split, row, column and remedy. (Images: `images`.)
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tap_jax.errors import UserError

REMEDY = "mend or remove that row, or set data.on_bad_row=skip"


class BadRow(UserError):
    """A row that cannot be used."""


def bad(where: str, column: str, wrong: str, remedy: str = REMEDY) -> BadRow:
    """The error of one entry.

    Args:
      where: task, split and row. column: its name. wrong: what is wrong with the entry.
    """
    return BadRow(f"{where}, column '{column}': {wrong}; {remedy}")


def label(
    value: Any, classes: int, *, where: str, column: str, remedy: str = "", names: Sequence[str | int] = ()
) -> int:
    """A class, from 0 to `classes` - 1, of its number: an integer, a bool, or a float without a fraction; or its name.

    Args:
      classes: how many there are.
      where, column: as of `bad`. remedy: in front of the usual one.
      names: what the column calls class 0, 1, ...; where they are texts, a number is the class's own.

    Raises:
      BadRow: null, an unknown text, a fraction, a number out of range. (-1 is what public test sets have for hidden
        labels.)
    """
    if is_null(value):
        raise bad(where, column, "label is null")
    if isinstance(value, (list, dict)):
        raise bad(where, column, f"a {type(value).__name__} where a label is expected")
    if isinstance(value, str):
        value = value.strip()
        value = value if names and isinstance(names[0], str) else number(value)
    if names and isinstance(value, str) == isinstance(names[0], str):
        if value in names:
            return list(names).index(value)
        listed = ", ".join(map(str, names[:5])) + (", ..." if len(names) > 5 else "")
        raise bad(where, column, f"label {_shown(value)} is none of the classes {listed}", remedy + REMEDY)
    if not isinstance(value, (int, float, np.number, np.bool_)):
        raise bad(where, column, f"label {_shown(value)} is not a number in 0..{classes - 1}", remedy + REMEDY)
    if not math.isfinite(value) or value != int(value):
        raise bad(where, column, f"label {value} is not a whole number")
    if not 0 <= value < classes:
        hidden = ", as of test sets whose labels are hidden" if value == -1 else ""
        raise bad(where, column, f"label {int(value)} is not in 0..{classes - 1}{hidden}", remedy + REMEDY)
    return int(value)


def number(text: str) -> int | float | str:
    """The number that a text writes, as cells of csv files do, or the text; 007 is no number."""
    if re.fullmatch(r"[-+]?(0|[1-9]\d*)", text):
        return int(text)
    return float(text) if re.fullmatch(r"[-+]?(0|[1-9]\d*)\.\d*", text) else text


def text(value: Any, *, where: str, column: str) -> str:
    """A text; a number (as csv files have them) is written out. The empty text is a text.

    Raises:
      BadRow: null, a type that is no text, or characters that no encoding has (lone surrogates).
    """
    if is_null(value):
        raise bad(where, column, "null where a text is expected")
    if isinstance(value, (int, float, np.number)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise bad(where, column, f"{_shown(value)} ({type(value).__name__}) where a text is expected")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise bad(where, column, f"a lone surrogate at character {error.start}, which is half a character") from None
    return value


def check(value: Any, *, where: str, column: str) -> None:
    """What a template is given: no nulls, no bytes, texts of whole characters; also inside of lists.

    Raises:
      BadRow: otherwise.
    """
    if isinstance(value, Mapping):
        return
    if isinstance(value, (list, tuple, np.ndarray)):
        for entry in value:
            check(entry, where=where, column=column)
    elif isinstance(value, bool):
        return
    else:
        text(value, where=where, column=column)


def is_null(value: Any) -> bool:
    """Null, or the NaN that stands for it in columns of floats."""
    return value is None or (isinstance(value, (float, np.floating)) and math.isnan(value))


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."
