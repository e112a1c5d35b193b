"""Templates: columns become texts, and what does not fit says so."""

import re

import pytest

from tap_jax.templates import Unfit, columns, fill, is_template

ROW = {
    "question": "Which?",
    "subject": "professional_law",
    "choices": ["no", "yes"],
    "answer": 1,
    "my column.of: text": "odd",
    "weight": 2.5,
    "record": {"a": 1},
}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("question", "Which?"),
        ("{question}", "Which?"),
        ("{subject:words}", "professional law"),
        ("{choices:list}", "no, yes"),
        ("{choices:options}", "A. no\nB. yes"),
        ("{answer:option of choices}", "B. yes"),
        ("{weight} kg, {{braces}}", "2.5 kg, {braces}"),
        ("{question} {question}", "Which? Which?"),
    ],
)
def test_forms(template, text):
    assert fill(template, ROW)[0] == text


def test_the_longest_text_is_found_where_it_stands():
    text, (begin, end) = fill("Of {subject:words}: {question} {choices:options}", ROW)
    assert text[begin:end] == "professional law"
    assert fill("{choices:list}", ROW)[1] == (0, 0)


def test_columns_are_each_named_once():
    assert columns("{a} {b:words} {a} {c:option of d}") == ("a", "b", "c", "d")
    assert (columns("plain name"), columns("")) == (("plain name",), ())
    assert is_template("{a}") and is_template("a}") and not is_template("a b")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{a", "expected '}' before end of string; write a brace that is no field twice"),
        ("a}", "Single '}' encountered in format string; write a brace that is no field twice"),
        ("{}", "a field {} without a column; write {column}"),
        ("{a:upper}", "unknown form 'upper' of column 'a'; use one of words, list, options, option of COLUMN"),
        ("{a!r}", "a conversion such as !r, which templates do not have; drop it"),
        ("{{a}}", "no column in it; write one as {column}"),
    ],
)
def test_a_template_that_is_none(template, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        columns(template)


@pytest.mark.parametrize(
    ("template", "changes", "column", "reason"),
    [
        ("{choices}", {}, "choices", "a list where a text is expected; write {column:list} or"),
        ("{record}", {}, "record", "a list where a text is expected"),
        ("{question:list}", {}, "question", "'Which?' where a list is expected"),
        ("{choices:options}", {"choices": []}, "choices", "0 choices; 1 to 10 have letters"),
        ("{choices:options}", {"choices": ["x"] * 11}, "choices", "11 choices; 1 to 10 have letters"),
        ("{answer:option of choices}", {"answer": 2}, "answer", "answer 2 of 2 choices"),
        ("{answer:option of choices}", {"answer": -1}, "answer", "answer -1 of 2 choices"),
        ("{answer:option of choices}", {"answer": "B"}, "answer", "answer 'B' is not a number in 0..1"),
        ("{answer:option of choices}", {"answer": 0.5}, "answer", "answer 0.5 is not a number in 0..1"),
    ],
)
def test_an_entry_that_does_not_fit(template, changes, column, reason):
    with pytest.raises(Unfit, match=re.escape(reason)) as caught:
        fill(template, ROW | changes)
    assert caught.value.column == column
