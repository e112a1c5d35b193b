"""Classes and domains that a declaration leaves to the training rows; labels by name; answers that are lists."""

import csv
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from tap_jax.assembly import data_settings
from tap_jax.config import load_config
from tap_jax.data import federated, loading, places
from tap_jax.data.classes import classes_of, domains_of
from tap_jax.errors import UserError
from tap_jax.federation import Client, Federation
from tap_jax.tasks import TASKS, declare, declared

datasets = pytest.importorskip("datasets")

FIELDS = {"kind": "text_classification", "text": "body", "label": "topic"}
NAMES = ("sport", "law", "art")


def write(folder, columns, *, features=None, split="train"):
    """One split as parquet, with the library's features where there are any."""
    folder.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_dict(columns, features=features)
    table.to_parquet(str(folder / f"{split}.parquet"))


def found(task, root, find=classes_of):
    return find(task, [places.rows_of(task, "train", root=str(root))])


@pytest.mark.parametrize(
    ("labels", "classes", "names"),
    [
        (["b", "a", "b", None], 2, ("a", "b")),
        ([2, 0, 1, 1], 3, ()),
        ([5, 1, 3, 1], 3, (1, 3, 5)),
        ([-1, 0, 1, 1], 3, (-1, 0, 1)),
        ([True, False, True, True], 2, ()),
        ([0.0, 1.0, None, 1.0], 2, ()),
    ],
)
def test_classes_of_the_training_rows(labels, classes, names, tmp_path):
    columns = {"body": ["x"] * 4, "topic": labels}
    for split in ("train", "test"):
        write(tmp_path / "own", columns, split=split)
    fields = FIELDS | found(declared("own", FIELDS), tmp_path)
    assert (fields["classes"], fields["class_names"]) == (classes, names)
    mended = [label for label in labels if label is not None]
    for split in ("train", "test"):
        write(tmp_path / "own", {"body": ["x"] * len(mended), "topic": mended}, split=split)
    read = loading.load(declared("own", fields), "train", root=str(tmp_path)).labels
    assert read.tolist() == [names.index(label) if names else int(label) for label in mended]


def test_class_labels_have_their_names(tmp_path):
    """The numbers of a `ClassLabel` are of its own names, also where these are digits in another order."""
    for names in (NAMES, ("1", "0", "2")):
        features = datasets.Features(
            {"body": datasets.Value("string"), "topic": datasets.ClassLabel(names=list(names))}
        )
        for split in ("train", "test"):
            write(tmp_path / "own", {"body": ["x"] * 3, "topic": [2, 0, 2]}, features=features, split=split)
        fields = FIELDS | found(declared("own", FIELDS), tmp_path)
        assert (fields["classes"], fields["class_names"]) == (3, names)
        assert loading.load(declared("own", fields), "test", root=str(tmp_path)).labels.tolist() == [2, 0, 2]


def test_declared_names_are_those_of_the_file_whatever_their_order(tmp_path):
    """What a `ClassLabel` numbers otherwise is told by its names; a name that is not declared is none."""
    topic = datasets.ClassLabel(names=["bank", "game"])
    features = datasets.Features({"body": datasets.Value("string"), "topic": topic})
    for split in ("train", "test"):
        write(tmp_path / "own", {"body": ["x", "y"], "topic": [1, 0]}, features=features, split=split)
    task = declared("own", FIELDS | {"class_names": ("game", "bank")})
    assert labels_of(task, tmp_path) == [0, 1]
    with pytest.raises(
        UserError, match="label 'game' is none of the classes play, bank; name it in tasks.own.class_names"
    ):
        labels_of(declared("own", FIELDS | {"class_names": ("play", "bank")}), tmp_path)


def labels_of(task, root):
    return loading.load(task, "train", root=str(root)).labels.tolist()


@pytest.mark.parametrize(
    ("cells", "names", "labels"),
    [
        (["0", "1", "1"], (), [0, 1, 1]),
        (["3", "1", "3"], (1, 3), [1, 0, 1]),
        (["01", "007", "01"], ("007", "01"), [1, 0, 1]),
        (["NA", "None", "NA"], ("NA", "None"), [0, 1, 0]),
        (["bank", " bank", "game "], ("bank", "game"), [0, 0, 1]),
        (["True", "False", "True"], ("False", "True"), [1, 0, 1]),
    ],
)
def test_cells_of_csv_files_are_what_they_say(cells, names, labels, tmp_path):
    """No leading zero, no "NA" and no text is lost; blanks around a label do not make another one."""
    for split in ("train", "test"):
        csv_file(tmp_path / "own" / f"{split}.csv", [("body", "topic"), *(("007", cell) for cell in cells)])
    task = declared("own", FIELDS | found(declared("own", FIELDS), tmp_path))
    assert task.class_names == names
    read = loading.load(task, "train", root=str(tmp_path))
    assert read.labels.tolist() == labels and read.inputs == ("007",) * 3


def test_csv_files_with_columns_in_another_order(tmp_path):
    csv_file(tmp_path / "own" / "train-1.csv", [("body", "topic", "more"), ("x", "a", "")])
    csv_file(tmp_path / "own" / "train-2.csv", [("topic", "body"), ("b", "y")])
    csv_file(tmp_path / "own" / "test.csv", [("topic", "body"), ("b", "y")])
    task = declared("own", FIELDS | {"class_names": ("a", "b")})
    read = loading.load(task, "train", root=str(tmp_path))
    assert (read.inputs, read.labels.tolist()) == (("x", "y"), [0, 1])


def csv_file(path, rows, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", **({"encoding": "utf-8"} | how)) as stream:
        csv.writer(stream).writerows(rows)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"topic": "bank"}, {"topic": 3}], "labels such as 'bank' are neither all texts nor all whole numbers"),
        ([{"topic": "2024-01-01"}, {"topic": "2024-01-02"}], "are neither all texts nor all whole numbers"),
        ([{"topic": ["bank"]}, {"topic": ["game"]}], "column 'topic': a list or record where one value is expected"),
    ],
)
def test_json_of_several_types(rows, message, tmp_path):
    """Which `datasets` turns into JSON texts or dates where it sees fit."""
    for split in ("train", "test"):
        (tmp_path / "own").mkdir(exist_ok=True)
        lines = [json.dumps({"body": "x"} | row) for row in rows]
        (tmp_path / "own" / f"{split}.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=re.escape(message)):
        found(declared("own", FIELDS), tmp_path)


def test_json_in_which_one_row_has_a_text_for_a_list(tmp_path):
    rows = [{"body": "x", "replies": ["one", "two"]}, {"body": "y", "replies": "three"}]
    for split in ("train", "test"):
        (tmp_path / "own").mkdir(exist_ok=True)
        (tmp_path / "own" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = declared("own", {"kind": "text_generation", "text": "body", "answer": "replies"})
    assert loading.load(task, "test", root=str(tmp_path)).references == (("one", "two"), ("three",))


def lines(*rows, **how):
    """Writes a csv file to a path."""
    return lambda path: csv_file(path, rows, **how)


HEADER = ("body", "topic")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lines(HEADER, ("ü", "a"), encoding="latin1"), "is not readable as csv .* save it as UTF-8"),
        (lines(HEADER, ("x", "a"), encoding="utf-16"), "is not readable as csv .* save it as UTF-8"),
        (lines(("body;topic",), ("x;a",)), "has no column 'topic' .*; its separator is ';': save it with commas"),
        (lines(("body", "Topic "), ("x", "a")), "no column 'topic' .it has body, 'Topic '.; did you mean 'Topic '"),
        (lines(HEADER), "train.csv has no rows|no labels"),
        (lambda path: path.with_suffix(".zip").write_bytes(b"PK"), "train.zip is of no format that is read; unpack it"),
    ],
    ids=["latin1", "utf-16", "semicolons", "another name", "a header alone", "zip"],
)
def test_files_that_are_not_read(make, message, tmp_path):
    (tmp_path / "data").mkdir()
    make(tmp_path / "data" / "train.csv")
    (place,) = (tmp_path / "data").iterdir()
    task = declared("own", FIELDS | {"path": str(place), "train": "train"})
    with pytest.raises(UserError, match=message) as caught:
        found(task, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_of_images_has_its_folders_as_classes(tmp_path):
    for split, kinds in (("train", ("cat", "dog")), ("test", ("cat", "dog", "owl"))):
        for number, kind in enumerate(kinds):
            place = tmp_path / "own" / split / kind
            place.mkdir(parents=True)
            Image.new("L", (8, 8), 40 * number).save(place / "1.png")
    given = {"kind": "image_classification", "image": "image", "label": "label"}
    fields = given | found(declared("own", given), tmp_path)
    assert (fields["classes"], fields["class_names"]) == (3, ("cat", "dog", "owl"))
    assert loading.load(declared("own", fields), "test", root=str(tmp_path)).labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([None, None], "own/train, column 'topic': no labels; name them in tasks.own.class_names"),
        ([0.5, 1.0], "labels such as 0.5 are neither all texts nor all whole numbers"),
    ],
)
def test_labels_that_are_no_classes(labels, message, tmp_path):
    for split in ("train", "test"):
        features = datasets.Features({"body": datasets.Value("string"), "topic": datasets.Value("float64")})
        write(tmp_path / "own", {"body": ["x", "y"], "topic": labels}, features=features, split=split)
    with pytest.raises(UserError, match=re.escape(message)):
        found(declared("own", FIELDS), tmp_path)


def test_numbers_of_rows_are_no_classes(tmp_path):
    write(tmp_path / "own", {"body": ["x"] * 10_001, "topic": [f"id{i}" for i in range(10_001)]})
    write(tmp_path / "own", {"body": ["x"], "topic": ["id0"]}, split="test")
    with pytest.raises(UserError, match="10,001 different labels; are they classes"):
        found(declared("own", FIELDS), tmp_path)


def test_a_name_that_training_rows_lack(tmp_path):
    for split, topic in (("train", "art"), ("test", "war")):
        write(tmp_path / "own", {"body": ["x", "y"], "topic": ["law", topic]}, split=split)
    task = declared("own", FIELDS | found(declared("own", FIELDS), tmp_path))
    message = "own/test row 1, column 'topic': label 'war' is none of the classes art, law; name it in tasks.own.class_"
    with pytest.raises(UserError, match=message):
        loading.load(task, "test", root=str(tmp_path))
    kept = loading.load(task, "test", root=str(tmp_path), on_bad_row="skip")
    assert kept.labels.tolist() == [1] and "1 rows skipped" in kept.notes[0]


def test_domains_of_a_column(tmp_path):
    columns = {"body": ["x", "y", "z"], "topic": ["a", "b", "a"], "ward": ["north", "south", "north"]}
    for split in ("train", "test"):
        write(tmp_path / "own", columns, split=split)
    given = FIELDS | {"domain_column": "ward", "class_names": ("a", "b")}
    fields = given | found(declared("own", given), tmp_path, domains_of)
    assert fields["domains"] == ("north", "south")
    assert loading.load(declared("own", fields), "train", root=str(tmp_path)).domains.tolist() == [0, 1, 0]
    renamed = given | {"domains": ("s", "n"), "domain_values": ("south", "north")}
    assert loading.load(declared("own", renamed), "train", root=str(tmp_path)).domains.tolist() == [1, 0, 1]
    for split in ("train", "test"):
        csv_file(tmp_path / "cells" / f"{split}.csv", [("body", "topic", "ward"), ("x", "a", "7"), ("y", "b", "2")])
    numbered = declared("cells", given | {"domains": ("two", "seven"), "domain_values": (2, 7)})
    assert loading.load(numbered, "train", root=str(tmp_path)).domains.tolist() == [1, 0]
    for split in ("train", "test"):
        write(tmp_path / "own", columns | {"ward": ["a.b", "south", "north"]}, split=split)
    with pytest.raises(UserError, match=re.escape("column 'ward': 'a.b' cannot name a domain; set tasks.own.domains")):
        found(declared("own", given), tmp_path, domains_of)


def test_answers_that_are_lists(tmp_path):
    """All of them are references, and the first is learned."""
    columns = {"photo": [png(1), png(2)], "captions": [["a cat", "one cat"], ["a dog"]]}
    for split in ("train", "test"):
        write(tmp_path / "own", columns, split=split)
    given = {"kind": "text_generation", "image": "photo"}
    for answer, first in (("captions", "a cat"), ("It is {captions}.", "It is a cat.")):
        read = loading.load(declared("own", given | {"answer": answer}), "test", root=str(tmp_path))
        assert read.targets[0] == first and list(map(len, read.references)) == [2, 1]
    joined = loading.load(declared("own", given | {"answer": "{captions:list}"}), "test", root=str(tmp_path))
    assert joined.targets == ("a cat, one cat", "a dog")
    for split in ("train", "test"):
        write(tmp_path / "own", columns | {"captions": [["a"], []]}, split=split)
    with pytest.raises(UserError, match="own/test row 1, column 'captions': an empty list where an answer is expected"):
        loading.load(declared("own", given | {"answer": "captions"}), "test", root=str(tmp_path))


def test_words_that_the_tokenizer_lacks_are_counted(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / "own", {"body": ["the news", "ÄÖ ß"], "topic": ["a", "b"]}, split=split)
    task = declared("own", FIELDS | {"class_names": ("a", "b"), "path": str(tmp_path / "own")})
    declare({"own": FIELDS | {"class_names": ("a", "b"), "path": str(tmp_path / "own")}})
    try:
        federation = Federation((Client("one", {"own": 1.0}),))
        config = load_config("demo", {"data.cache_dir": str(tmp_path / "cache"), "data.root": str(tmp_path)})
        notes = federated.build(federation, (task,), data_settings(config)).notes
    finally:
        TASKS.pop("own")
    (line,) = notes
    assert re.fullmatch(r"data: own: \d+ % of its word pieces are not in data.tokenizer 'demo_flava'; .*", line)


def test_a_path_of_its_own(tmp_path, monkeypatch):
    """A file, a folder, or a data set of the hub, whatever data.root says."""
    for split in ("train", "test"):
        with open(tmp_path / f"{split}.csv", "w", newline="") as stream:
            csv.writer(stream).writerows([("body", "topic"), ("x", "a"), ("y", "b")])
    fields = FIELDS | {"class_names": ("a", "b")}
    task = declared("own", fields | {"path": str(tmp_path)})
    assert loading.load(task, "train", root="synthetic").labels.tolist() == [0, 1]
    with pytest.raises(
        UserError, match="tasks.own.path: there is no file or folder nowhere, and no data set owner/name"
    ):
        loading.load(declared("own", fields | {"path": "nowhere"}), "train", root="synthetic")
    (tmp_path / "bad" / "train.csv").parent.mkdir()
    (tmp_path / "bad" / "train.csv").write_text("body,other\nx,y\n")
    with pytest.raises(UserError, match=r"tasks.own.path: \S+bad\S* has no column 'topic' \(it has body, other\)"):
        loading.load(declared("own", fields | {"path": str(tmp_path / "bad")}), "train", root="synthetic")
    asked = []

    def load_dataset(name, config, *, split, cache_dir):
        asked.append((name, config, split))
        return datasets.Dataset.from_dict({"body": ["x"], "topic": ["b"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for place, root in (("some/news", "synthetic"), ("", "some/news")):
        task = declared("own", fields | {"path": place, "configs": ("en",), "test": "validation"})
        assert loading.load(task, "test", root=root).labels.tolist() == [1]
    assert asked == [("some/news", "en", "validation")] * 2
    with pytest.raises(UserError, match="data.root: 'hub', but task own names no data set; set tasks.own.hub"):
        loading.load(declared("own", fields), "test", root="hub")


def png(value):
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8), value, np.uint8)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}
