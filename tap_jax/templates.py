"""Templates: how the columns of a row become a text, written as format strings.

  {question}                    the column's text; a number is written out
  {subject:words}               with blanks for underscores: professional_law is "professional law"
  {concepts:list}               a list's entries, joined by commas
  {choices:options}             a line "A. ..." for each entry of a list
  {answer:option of choices}    the line of the entry with that number, counted from 0

A brace is written twice: {{. The templates of Table 23 are in `tap_jax.tasks`.
"""

import string
from collections.abc import Mapping
from typing import Any

LETTERS = "ABCDEFGHIJ"  # of options
FORMS = ("words", "list", "options", "option of COLUMN")


class Unfit(ValueError):
    """An entry of a row that a template cannot use.

    Attributes:
      column: the entry's.
      reason: what is wrong with it.
    """

    def __init__(self, column: str, reason: str):
        super().__init__(f"column '{column}': {reason}")
        self.column, self.reason = column, reason


def is_template(text: str) -> bool:
    """Whether it is one, and not a column's name."""
    return "{" in text or "}" in text


def columns(text: str) -> tuple[str, ...]:
    """The columns that a template reads, or the one column that is named; none for "".

    Raises:
      ValueError: braces that do not pair, a field without a column, or an unknown form.
    """
    if not is_template(text):
        return (text,) if text else ()
    found: dict[str, None] = {}
    for _, column, form in _parts(text):
        if column is None:
            continue
        if not column:
            raise ValueError("a field {} without a column; write {column}")
        other = form.removeprefix("option of ")
        if form and form not in FORMS and other == form:
            raise ValueError(f"unknown form '{form}' of column '{column}'; use one of {', '.join(FORMS)}")
        found |= {column: None} | ({other: None} if other != form else {})
    if not found:
        raise ValueError("no column in it; write one as {column}")
    return tuple(found)


def fill(text: str, row: Mapping[str, Any]) -> tuple[str, tuple[int, int]]:
    r"""A template's text for one row, and where its longest column is.

    Args:
      text: a template, or a column's name.
      row: column -> entry.

    Returns:
      The text; and (begin, end) in characters of the longest entry that is a text by itself, (0, 0) where none is.

    Raises:
      Unfit: an entry of another type than its form wants.

    Example:
      >>> fill("Question: {question} Options:\n{choices:options}", {"question": "Which?", "choices": ["one", "two"]})
      ('Question: Which? Options:\nA. one\nB. two', (10, 16))
    """
    filled, longest = "", (0, 0)
    for literal, column, form in _parts(text) if is_template(text) else (("", text, ""),):
        filled += literal
        if column is None:
            continue
        entry = _FORMS[form.partition(" ")[0]](column, row, form)
        if isinstance(row[column], str) and len(entry) > longest[1] - longest[0]:
            longest = (len(filled), len(filled) + len(entry))
        filled += entry
    return filled, longest


def _parts(text: str) -> list[tuple[str, str | None, str]]:
    """(text before, column or None, form) of each piece of a template."""
    try:
        found = list(string.Formatter().parse(text))
        if any(conversion for *_, conversion in found):
            raise ValueError("a conversion such as !r, which templates do not have")
    except ValueError as error:
        remedy = "drop it" if "conversion" in str(error) else "write a brace that is no field twice"
        raise ValueError(f"{error}; {remedy}") from None
    return [(literal, column, form or "") for literal, column, form, _ in found]


def _plain(column: str, row: Mapping[str, Any], form: str) -> str:
    entry = row[column]
    if isinstance(entry, (list, tuple, Mapping)):
        raise Unfit(column, "a list where a text is expected; write {column:list} or {column:options} in the template")
    return str(entry)


def _words(column: str, row: Mapping[str, Any], form: str) -> str:
    return _plain(column, row, form).replace("_", " ")


def _list(column: str, row: Mapping[str, Any], form: str) -> str:
    return ", ".join(_entries(column, row))


def _options(column: str, row: Mapping[str, Any], form: str) -> str:
    return "\n".join(_lettered(column, row))


def _option(column: str, row: Mapping[str, Any], form: str) -> str:
    options, number = _lettered(form.removeprefix("option of "), row), row[column]
    if isinstance(number, str) and number.strip().isdecimal():  # as csv has it
        number = int(number)
    if isinstance(number, (str, bytes, list, tuple, Mapping)) or number != number or number != int(number):
        raise Unfit(column, f"answer {number!r} is not a number in 0..{len(options) - 1}")
    if not 0 <= number < len(options):
        raise Unfit(column, f"answer {int(number)} of {len(options)} choices")
    return options[int(number)]


_FORMS = {"": _plain, "words": _words, "list": _list, "options": _options, "option": _option}


def _entries(column: str, row: Mapping[str, Any]) -> list[str]:
    entries = row[column]
    if not isinstance(entries, (list, tuple)):
        raise Unfit(column, f"{entries!r:.40} where a list is expected")
    return list(map(str, entries))


def _lettered(column: str, row: Mapping[str, Any]) -> list[str]:
    entries = _entries(column, row)
    if not 0 < len(entries) <= len(LETTERS):
        raise Unfit(column, f"{len(entries)} choices; 1 to {len(LETTERS)} have letters")
    return [f"{letter}. {entry}" for letter, entry in zip(LETTERS, entries, strict=False)]
