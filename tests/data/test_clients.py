"""Clients that the data name: who they are, what they have, and that only their names count."""

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tap_jax.assembly import data_settings, federation_of
from tap_jax.config import default_config, load_config, override, validate
from tap_jax.data import clients, federated, loading, samples, sites
from tap_jax.data.partition import by_name
from tap_jax.errors import UserError
from tap_jax.federation import Client, Federation
from tap_jax.tasks import find_task

NEWS = [("Basel", 0), ("anna", 1), ("Basel", 1), ("3", 2), ("anna", 3), ("Basel", 0)]


def write(folder, split, rows, column="who"):
    """News whose text says which row it is."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = {"text": [f"{split} {n}" for n in range(len(rows))], "label": [label for _, label in rows]}
    if column:
        columns[column] = [name for name, _ in rows]
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / f"{split}.parquet")


@pytest.fixture
def by_column(tmp_path):
    write(tmp_path / "ag_news", "train", NEWS)
    # In another order, without "3", and with one whom nobody knows.
    write(tmp_path / "ag_news", "test", [("new", 0), ("anna", 1), ("Basel", 2), ("anna", 0)])
    return tmp_path


@pytest.fixture
def by_folder(tmp_path):
    for name in ("Basel", "anna", "3"):
        for split in ("train", "test"):
            mine = [(who, label) for who, label in NEWS if who == name]
            write(tmp_path / name / "ag_news", split, mine, column="")
    (tmp_path / ".hidden").mkdir()
    return tmp_path


def config_of(root, **fields):
    fields = {"federation.split": "column", "data.client_column": "who", "data.test_split": "personal"} | fields
    config = override(default_config(), {"data.root": str(root), "data.cache_dir": str(root / "cache")} | fields)
    validate(config)
    return config


def data_of(config):
    federation = federation_of(config)
    return federation, federated.build(federation, federation.tasks, data_settings(config))


def test_a_column_says_who_the_clients_are(by_column):
    federation, data = data_of(config_of(by_column))
    assert [client.name for client in federation.clients] == ["3", "Basel", "anna"]
    assert [dict(client.samples) for client in federation.clients] == [{"ag_news": n} for n in (1, 3, 2)]
    assert federation.labels == ("3", "Basel", "anna")
    assert [mine.streams["ag_news"].tolist() for mine in data.clients] == [[3], [0, 2, 5], [1, 4]]
    # Test rows are those of the same name, whatever their order; who has none is without a test set.
    assert [{t: ids.tolist() for t, ids in mine.items()} for mine in data.personal_tests] == [
        {},
        {"ag_news": [2]},
        {"ag_news": [1, 3]},
    ]


def test_a_folder_for_each_client_says_the_same(by_folder):
    federation, data = data_of(config_of(by_folder, **{"federation.split": "folder", "data.client_column": ""}))
    assert [client.name for client in federation.clients] == ["3", "Basel", "anna"]
    labels = [data.train["ag_news"].labels[mine.streams["ag_news"]].tolist() for mine in data.clients]
    assert labels == [[2], [0, 1, 0], [1, 3]]


@pytest.mark.parametrize("limit", [0, 3, 4])
def test_the_names_that_are_read_alone_are_those_of_the_rows(by_column, limit):
    """Through a limit and the cache."""
    task, chosen = find_task("ag_news"), data_settings(config_of(by_column, **{"data.train_size": limit}))
    for _ in range(2):
        rows = clients.read(task, "train", chosen, limit=limit or None)
        assert list(rows.clients) == clients.names_of(task, "train", chosen)
        assert [NEWS[int(text.split()[1])][0] for text in rows.inputs] == list(rows.clients)


def test_a_limit_makes_a_smaller_federation(by_column):
    federation, data = data_of(config_of(by_column, **{"data.train_size": 2, "cohort_size": 1}))
    assert sum(mine.samples for mine in data.clients) == 2
    assert len(federation.clients) == len(data.clients) <= 2


def test_concept_sets_of_two_clients_are_two_samples(tmp_path):
    folder = tmp_path / "common_gen"
    folder.mkdir()
    columns = {
        "concept_set_idx": [0, 0, 0, 1],
        "concepts": [["a", "b"]] * 3 + [["c"]],
        "target": ["a b", "b a", "b, a", "c"],
        "who": ["x", "y", "x", "y"],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "test.parquet")
    found = loading.load(find_task("common_gen"), "test", root=str(tmp_path), client_column="who")
    assert found.clients == ("x", "y", "y")
    said = [[text.removeprefix("Description: ") for text in texts] for texts in found.references]
    assert said == [["a b", "b, a"], ["b a"], ["c"]]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=60), st.lists(st.sampled_from("abcxyz"), max_size=30))
def test_only_names_count(train, test):
    """Every row goes to the client of its name, in both splits."""
    names = sorted(set(train))
    federation = Federation(tuple(Client(name, {"vqa": 1 / len(names)}) for name in names), named=True)
    for rows, dealt in (
        (train, by_name(federation, {"vqa": train})),
        (test, by_name(federation, {"vqa": test}, test=True)),
    ):
        for name, mine in zip(names, dealt, strict=True):
            assert mine.get("vqa", np.zeros(0)).tolist() == [i for i, row in enumerate(rows) if row == name]


def test_names_are_text_and_numbers_alike():
    given = (3, 3.0, "3", " 3 ", np.int64(3), 2.5)
    names = [samples.client_name(value, where="row", column="who") for value in given]
    assert names == ["3", "3", "3", "3", "3", "2.5"]


def test_centralised_has_all_of_it(by_column):
    federation, data = data_of(config_of(by_column, method="centralised", cohort_size=3))
    assert len(federation.clients) == 1 and not federation.named
    assert sorted(data.clients[0].streams["ag_news"].tolist()) == list(range(6))


def test_clients_are_found_by_name():
    federation = Federation((Client("Basel", {"vqa": 0.5}), Client("7", {"vqa": 0.5})), named=True)
    assert [federation.number_of(name) for name in ("Basel", "7", 7)] == [0, 1, 1]
    with pytest.raises(UserError, match="client: no client 'Basle'; did you mean 'Basel'"):
        federation.number_of("Basle")
    with pytest.raises(UserError, match="no client '0'; the run has Basel, 7"):
        federation.number_of(0)  # names, where there are any
    with pytest.raises(UserError, match="two of one name"):
        Federation((Client("a", {"vqa": 0.5}), Client("a", {"vqa": 0.5})), named=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data.client_column": ""}, "data.client_column: empty"),
        ({"data.client_column": "town"}, "no column 'town'"),
        ({"federation.split": "iid"}, "data.client_column: goes with federation.split='column', not 'iid'"),
        ({"data.root": "synthetic"}, "data.root: 'synthetic' has no clients"),
        ({"data.root": "hub"}, "federation.tasks: empty"),
        ({"data.root": "sites"}, "the embedded sites have a column 'site'"),
        ({"federation.tasks": ("weather",)}, "unknown task 'weather'"),
        ({"federation.tasks": ("vqa",)}, "data.root: no folder vqa"),
        ({"cohort_size": 4}, "cohort_size: 4, but the data name 3 clients"),
        ({"federation.split": "folder", "data.client_column": ""}, "no task has data in any folder"),
        ({"federation.split": "folder"}, "data.client_column: goes with"),
    ],
)
def test_what_is_wrong_is_one_line(by_column, fields, message):
    with pytest.raises(UserError, match=message) as found:
        federation_of(config_of(by_column, **fields))
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", None], "ag_news/train row 1, column 'who': no client's name"),
        (["a", "  "], "ag_news/train row 1, column 'who': no client's name"),
        (["a", "x" * 201], "use a printable name of at most 200 bytes"),
        (["a", "b\nc"], "client 'b.nc': use a printable name"),
    ],
)
def test_a_row_without_a_usable_name(tmp_path, names, message):
    write(tmp_path / "ag_news", "train", [(name, 0) for name in names])
    with pytest.raises(UserError, match=message):
        federation_of(config_of(tmp_path))


def test_rows_without_a_name_can_be_skipped(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / "ag_news", split, [("a", 0), (None, 1), ("b", 2)])
    federation, data = data_of(config_of(tmp_path, **{"data.on_bad_row": "skip"}))
    assert [client.name for client in federation.clients] == ["a", "b"]
    assert data.train["ag_news"].labels.tolist() == [0, 2] and any("1 rows skipped" in note for note in data.notes)


@pytest.mark.parametrize("task", sites.tasks())
def test_the_embedded_sites_have_what_they_say(task):
    task = find_task(task)
    for split in ("train", "test"):
        rows = sites.load(task, split, seed=3)
        assert list(rows.clients) == sites.names(task.name, split)
        for site, parts in sites.SITES.items():
            mine = rows.take([i for i, name in enumerate(rows.clients) if name == site])
            assert len(mine) == (getattr(parts[task.name], split) if task.name in parts else 0)
            if len(mine) and parts[task.name].domains:
                assert {task.domains[d] for d in mine.domains} == set(parts[task.name].domains)
            if len(mine) and mine.labels is not None:
                low, high = (round(bound * task.classes) for bound in parts[task.name].classes)
                assert mine.labels.min() >= low and mine.labels.max() < high


def test_thousands_of_clients_take_seconds(tmp_path):
    """Nothing grows with the square: ten times as many clients take about ten times as long, at most thirty times."""
    import time

    taken = []
    for count in (500, 5000):
        root = tmp_path / str(count)
        write(root / "ag_news", "train", [(f"phone {n % count}", n % 4) for n in range(4 * count)])
        write(root / "ag_news", "test", [("phone 0", 0)])
        started = time.perf_counter()
        federation = federation_of(config_of(root))
        by_name(federation, {"ag_news": [f"phone {n % count}" for n in range(4 * count)]})
        assert len(federation.clients) == count and federation.task_mask.all() and federation.labels[0] == "phone 0"
        taken.append(time.perf_counter() - started)
    assert taken[1] < 30 * taken[0] + 1


def test_the_sites_are_a_configuration():
    config = load_config("configs/sites.py")
    assert {client.name for client in federation_of(config).clients} == set(sites.SITES)
