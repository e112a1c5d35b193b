"""Every layout in which people have files gives the arrays of the plain one; what is ambiguous is one clear line."""

import csv
import io
import json
import pathlib

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from tap_jax.data import loading, places, reading
from tap_jax.data.images import to_rgb64
from tap_jax.errors import UserError
from tap_jax.tasks import find_task

NEWS, PICTURES = find_task("ag_news"), find_task("tiny_imagenet")
TEXTS = {
    "train": [{"text": f"a, “{i}”\nb", "label": i % 4} for i in range(300)],  # more rows than are read at once
    "test": [{"text": f"test {i}", "label": 3 - i % 4} for i in range(7)],
}
CLASSES = ("bee", "cat", "train")  # a class may be called like a split


def parquet(path: pathlib.Path, rows: list[dict], **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)


def image(value: int) -> Image.Image:
    return Image.fromarray(np.arange(value, value + 108, dtype=np.uint8).reshape(6, 6, 3))


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    image(value).save(buffer, "PNG")
    return buffer.getvalue()


def as_plain(folder, rows):
    for split in rows:
        parquet(folder / f"{split}.parquet", rows[split])


def as_hub(test="test", below=""):
    def write(folder, rows):
        for split, name in (("train", "train"), ("test", test)):
            parquet(folder / below / f"{name}-00000-of-00001.parquet", rows[split])
        (folder / "README.md").write_text("# a card")
        (folder / ".cache").mkdir()
        (folder / ".cache" / "train-00000-of-00001.parquet.metadata").write_text("x")

    return write


def as_shards(folder, rows):
    for split in rows:
        for k in range(3):
            parquet(folder / "data" / f"{split}-{k:05}-of-00003.parquet", rows[split][k * 101 : (k + 1) * 101] or [])
            if not rows[split][k * 101 : (k + 1) * 101]:
                (folder / "data" / f"{split}-{k:05}-of-00003.parquet").unlink()


def as_row_groups(folder, rows):
    for split in rows:
        parquet(folder / split / "0.parquet", rows[split], row_group_size=3)


def as_csv(separator=",", suffix="csv"):
    def write(folder, rows):
        folder.mkdir()
        for split in rows:
            with open(folder / f"news_{split}.{suffix}", "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(rows[split][0]), delimiter=separator)
                writer.writeheader()
                writer.writerows(rows[split])

    return write


def as_json_lines(folder, rows):
    folder.mkdir()
    for split, name in (("train", "train"), ("test", "dev")):
        lines = [json.dumps(row) for row in rows[split]]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")


def as_json(folder, rows):
    folder.mkdir()
    for split in rows:
        (folder / f"{split}.json").write_text(json.dumps(rows[split]), encoding="utf-8")


def as_saved(folder, rows):
    datasets.DatasetDict({split: datasets.Dataset.from_list(rows[split]) for split in rows}).save_to_disk(folder)


def as_saved_shards(folder, rows):
    for split in rows:
        datasets.Dataset.from_list(rows[split]).save_to_disk(folder / split, num_shards=2)


TEXT_LAYOUTS = {
    "hub": as_hub(),
    "hub, data/": as_hub(below="data"),
    "hub, validation for test": as_hub("validation", "data"),
    "hub, valid for test": as_hub("valid"),
    "hub, a sub-folder with a dot and blanks": as_hub(below="v1.0 [new]"),
    "shards": as_shards,
    "small row groups": as_row_groups,
    "csv": as_csv(),
    "tsv": as_csv("\t", "tsv"),
    "json lines, dev for test": as_json_lines,
    "json": as_json,
    "saved to disk": as_saved,
    "saved to disk, in shards": as_saved_shards,
}


@pytest.mark.parametrize("layout", TEXT_LAYOUTS)
def test_texts_of_every_layout(layout, tmp_path):
    as_plain(tmp_path / "plain" / "ag_news", TEXTS)
    (tmp_path / "other").mkdir()
    TEXT_LAYOUTS[layout](tmp_path / "other" / "ag_news", TEXTS)
    for split, rows in TEXTS.items():
        for limit in (None, 5):
            plain = loading.load(NEWS, split, root=str(tmp_path / "plain"), limit=limit)
            other = loading.load(NEWS, split, root=str(tmp_path / "other"), limit=limit)
            assert other.inputs == plain.inputs and np.array_equal(other.labels, plain.labels)
        every = loading.load(NEWS, split, root=str(tmp_path / "other"))
        assert every.inputs == tuple(row["text"] for row in rows)
        assert every.labels.tolist() == [row["label"] for row in rows]


def image_folder(folder, values, test="test"):
    for split, name in (("train", "train"), ("test", test)):
        for label, value in values[split]:
            path = folder / name / CLASSES[label] / f"{value:03}*.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image(value).save(path)


def image_metadata(folder, values):
    for split in values:
        (folder / split / "files").mkdir(parents=True)
        lines = ["file_name,label"]
        for label, value in values[split]:
            image(value).save(folder / split / "files" / f"{value}.png")
            lines.append(f"files/{value}.png,{label}")
        (folder / split / "metadata.csv").write_text("\n".join(lines))


def image_rows(values, feature=False):
    rows = {
        split: [{"image": {"bytes": png(v), "path": None}, "label": c} for c, v in values[split]] for split in values
    }
    if not feature:
        return rows
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    return datasets.DatasetDict({split: datasets.Dataset.from_list(rows[split], features=kinds) for split in rows})


def image_hub(folder, values):
    (folder / "data").mkdir(parents=True)
    for (split, table), name in zip(image_rows(values, feature=True).items(), ("train", "valid"), strict=True):
        table.to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")
        assert split in ("train", "test")


IMAGE_LAYOUTS = {
    "hub, valid for test": image_hub,
    "saved to disk": lambda folder, values: image_rows(values, feature=True).save_to_disk(folder),
    "class folders": image_folder,
    "class folders, val for test": lambda folder, values: image_folder(folder, values, "val"),
    "metadata.csv": image_metadata,
}


@pytest.mark.parametrize("layout", IMAGE_LAYOUTS)
def test_images_of_every_layout(layout, tmp_path):
    """The test split lacks the first class: numbers are those of both splits' classes."""
    values = {"train": [(i // 4, 5 * i) for i in range(12)], "test": [(1, 70), (2, 80), (2, 90)]}
    as_plain(tmp_path / "plain" / "tiny_imagenet", image_rows(values))
    (tmp_path / "other").mkdir()
    IMAGE_LAYOUTS[layout](tmp_path / "other" / "tiny_imagenet", values)
    for split in values:
        for limit in (None, 2):
            plain = loading.load(PICTURES, split, root=str(tmp_path / "plain"), limit=limit)
            other = loading.load(PICTURES, split, root=str(tmp_path / "other"), limit=limit)
            assert np.array_equal(other.images, plain.images) and np.array_equal(other.labels, plain.labels)
        assert plain.labels.dtype == np.int32 and len(set(map(bytes, plain.images))) == 2


def test_what_the_hub_calls_its_splits(tmp_path):
    """A download of mmlu has no train: test is trained on, validation tested on, and dev left out; of common_gen,
    test has no answers."""
    row = {"question": "q", "choices": ["a", "b", "c", "d"], "answer": 3}
    for subject in ("professional_law", "professional_medicine", "moral_scenarios", "anatomy"):
        for split, rows in (("test", 5), ("validation", 2), ("dev", 1)):
            path = tmp_path / "mmlu" / subject / f"{split}-00000-of-00001.parquet"
            parquet(path, [row | {"subject": subject}] * rows)
    train, test = (loading.load(find_task("mmlu"), split, root=str(tmp_path)) for split in ("train", "test"))
    assert train.domains.tolist() == [0] * 5 + [1] * 5 + [2] * 5 and test.domains.tolist() == [0, 0, 1, 1, 2, 2]
    for split, answer in (("train", "x"), ("validation", "y"), ("test", "")):
        rows = [{"concept_set_idx": i, "concepts": ["a"], "target": answer} for i in range(3)]
        parquet(tmp_path / "common_gen" / "data" / f"{split}-00000-of-00001.parquet", rows)
    assert loading.load(find_task("common_gen"), "test", root=str(tmp_path)).targets == ("Description: y",) * 3


def test_a_download_of_one_split_is_divided_by_image(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "VQA_TRAIN_ROWS", 8)
    rows = [
        {"image": {"bytes": png(i // 2), "path": None}, "question": f"{i}?", "multiple_choice_answer": "yes"}
        for i in range(12)
    ]
    for k in range(2):
        parquet(tmp_path / "vqa" / "data" / f"validation-{k:05}-of-00002.parquet", rows[k * 6 : (k + 1) * 6])
    train, test = (loading.load(find_task("vqa"), split, root=str(tmp_path)) for split in ("train", "test"))
    assert (len(train), len(test)) == (8, 4) and not set(train.inputs) & set(test.inputs)
    assert not set(map(bytes, train.images)) & set(map(bytes, test.images))
    for part in (train, test):  # a row keeps its image
        for text, found in zip(part.inputs, part.images, strict=True):
            number = int(text.split()[-1].strip("?"))
            assert np.array_equal(found, to_rgb64(png(number // 2), where=""))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["train.csv"], "ag_news has nothing to test on .it has train.; name files or a folder there 'test'"),
        (["test.csv"], "ag_news has nothing to train on .it has test."),
        (["train.csv", "valid.csv", "dev.csv"], "has two splits to test on, dev and valid; remove or rename one"),
        (["train.csv", "test.csv", "testing.csv"], "has two splits to test on, test and testing"),
        (["train.csv", "test.jsonl"], "ag_news has test.jsonl and train.csv; keep the files of one format"),
        (["a.csv", "test.csv", "training.csv"], None),
        (
            ["notes.md"],
            "ag_news has no data .parquet, csv, json lines, arrow or images, but notes.md.; put train.parquet",
        ),
        ([], "ag_news has no data"),
    ],
)
def test_which_file_is_which_split(files, message, tmp_path):
    (tmp_path / "ag_news").mkdir()
    for name in files:
        (tmp_path / "ag_news" / name).write_text("text,label\na,1\n")

    def read():
        for split in ("train", "test"):
            loading.load(NEWS, split, root=str(tmp_path))

    if message is None:
        return read()
    with pytest.raises(UserError, match=f"^data.root: .*{message}") as caught:
        read()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.csv", b"text,label\na,1\nb,2,3,4\n", "train.csv is not readable as csv"),
        ("train.csv", b"text,label\n\xff\xfe,1\n", "train.csv is not readable as csv"),
        ("train.jsonl", b'{"text": "a", "label": 1}\n{"text": ', "train.jsonl is not readable as json"),
        ("train.arrow", b"junk", "train.arrow is not readable as arrow"),
        ("train-00000-of-00001.parquet", b"PAR1junk", "train-00000-of-00001.parquet is not readable as parquet"),
    ],
)
def test_a_damaged_file_is_one_line(name, content, message, tmp_path):
    (tmp_path / "ag_news").mkdir()
    (tmp_path / "ag_news" / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        loading.load(NEWS, "train", root=str(tmp_path))
    assert "\n" not in str(caught.value)


def test_images_are_never_all_in_memory(tmp_path, monkeypatch):
    """Encoded images come a few at a time, whatever the size of a row group."""
    held, most = [], []
    rows = [{"image": {"bytes": png(i % 100), "path": None}, "label": 0} for i in range(1000)]
    parquet(tmp_path / "tiny_imagenet" / "train.parquet", rows)
    parquet(tmp_path / "tiny_imagenet" / "test.parquet", rows[:1])
    real = reading.Rows._batches

    def counted(self, names):
        for batch in real(self, names):
            held.append(batch.num_rows if "image" in batch.column_names else 0)
            most.append(held[-1])
            yield batch

    monkeypatch.setattr(reading.Rows, "_batches", counted)
    assert len(loading.load(PICTURES, "train", root=str(tmp_path))) == 1000
    assert sum(held) == 1000 and max(most) <= 256


def test_the_cache_follows_every_file(tmp_path):
    as_shards(tmp_path / "ag_news", TEXTS)
    read = lambda: loading.load(NEWS, "train", root=str(tmp_path), cache_dir=str(tmp_path / "cache")).inputs[-1]  # noqa: E731
    first = read()
    parquet(tmp_path / "ag_news" / "data" / "train-00002-of-00003.parquet", [{"text": "new", "label": 0}])
    assert read() == "new" != first
    parquet(tmp_path / "ag_news" / "data" / "train-00003-of-00003.parquet", [{"text": "newer", "label": 0}])
    assert read() == "newer"
