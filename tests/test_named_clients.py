"""Two hundred named clients with unequal tasks: trained, resumed, reported by name, evaluated and exported."""

import json
import re

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from tap_jax import experiment as experiments
from tap_jax.cli import main as cli
from tap_jax.config import load_config, to_json
from tap_jax.config.defaults import default_config
from tap_jax.config.fields import override
from tap_jax.errors import Preempted, UserError
from tap_jax.runs.runner import run
from tests.conftest import TINY
from tests.trajectories import run_by

pytestmark = pytest.mark.slow

CLIENTS = 200
NAMES = [f"site {n:03d}/ä" if n % 7 == 0 else f"site-{n:03d}" for n in range(CLIENTS)]
WORDS = ("rain", "goal", "bank", "chip")


def rows_of(n: int) -> dict[str, int]:
    """Task -> training rows of client n: all have one task, some two, and amounts differ."""
    tasks = {"ag_news": 1 + n % 5} if n % 3 else {"common_gen": 2 + n % 2}
    return tasks | ({"common_gen": 1 + n % 3} if n % 4 == 0 else {})


def write(root, task, split, counts):
    names = [name for name, count in counts.items() for _ in range(count)]
    names = [names[i] for i in np.random.default_rng(len(split)).permutation(len(names))]
    words = [f"{WORDS[i % 4]} {WORDS[i // 4 % 4]}" for i in range(len(names))]
    if task == "ag_news":
        columns = {"text": words, "label": [i % 4 for i in range(len(names))]}
    else:
        columns = {
            "concept_set_idx": list(range(len(names))),
            "concepts": [text.split() for text in words],
            "target": [f"a {text}" for text in words],
        }
    (root / task).mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns | {"site": names}), root / task / f"{split}.parquet")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("sites")
    tables = {"ag_news": {}, "common_gen": {}}
    for n, name in enumerate(NAMES):
        for task, count in rows_of(n).items():
            tables[task][name] = count
    for task, counts in tables.items():
        write(root, task, "train", counts)
        # In another order; every tenth client has no test rows.
        write(root, task, "test", {name: 1 for name in reversed(counts) if NAMES.index(name) % 10})
    fields = {field: value for field, value in TINY.items() if not field.startswith(("federation.", "data."))}
    fields |= {
        "rounds": 4,
        "cohort_size": 10,
        "checkpoint_every": 2,
        "variants": ("tap",),
        "federation.split": "column",
        "data.client_column": "site",
        "data.root": str(root),
        "data.cache_dir": str(root / "cache"),
        "data.test_split": "personal",
        "engine.clients_at_once": 50,
        "metrics.bertscore_model": "auto",
    }
    path = root / "config.json"
    path.write_text(to_json(override(default_config(), fields)))
    return path


@pytest.fixture(scope="module")
def experiment(config):
    return experiments.build(load_config(config))


@pytest.fixture(scope="module")
def workdir(config, experiment, tmp_path_factory):
    """A run that was stopped after two rounds and went on, from data that were read anew."""
    folder = tmp_path_factory.mktemp("runs") / "named"
    asked = iter([False, False])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiments.Experiment, "prepare", lambda self: None)  # it never comes to the last phase
        with pytest.raises(Preempted, match="stopped after round 2 of 4"):
            run(load_config(config), folder, stop=lambda: next(asked, True))
    run_by(experiment, folder)
    return folder


def test_everybody_has_what_is_theirs(workdir):
    found = json.loads((workdir / "clients.json").read_text(encoding="utf-8"))
    assert {entry["name"]: entry["tasks"] for entry in found} == {name: rows_of(n) for n, name in enumerate(NAMES)}


def test_names_stay_names(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["round"] for line in lines] == [0, 1, 2, 3]
    for line in lines:
        assert len(line["clients"]) == 10 and set(line["clients"]) <= set(NAMES)
        assert set(line["losses"]["federated"]) == set(line["bytes_sent"]) == set(line["clients"])
        assert {entry["client"] for entry in line["replacements"]} <= set(line["clients"])
        for name, losses in line["losses"]["federated"].items():
            assert set(losses) <= set(rows_of(NAMES.index(name)))
    rows = json.loads((workdir / "results.json").read_text(encoding="utf-8"))["results"]
    scored = {(row["client"], row["task"]) for row in rows}
    assert scored == {(name, task) for n, name in enumerate(NAMES) if n % 10 for task in rows_of(n)}
    report = (workdir / "report.md").read_text(encoding="utf-8")
    assert len(re.findall(r"^\| site", report, re.MULTILINE)) == len({name for name, _ in scored})
    assert len(list((workdir / "models" / "tap").iterdir())) == CLIENTS
    assert list((workdir / "models" / "tap").glob("*_site 007%2F%C3%A4.safetensors"))


def test_resumed_is_as_in_one_go(workdir, experiment, tmp_path):
    run_by(experiment, tmp_path / "whole")
    for name in ("metrics.jsonl", "results.json"):
        files = [(folder / name).read_text(encoding="utf-8") for folder in (workdir, tmp_path / "whole")]
        kept = [re.sub(r'"seconds": [\d.]+|"timing": \{[^}]*\}', "", text) for text in files]
        assert kept[0] == kept[1], name


def test_one_client_by_name(workdir, tmp_path, capsys):
    before = (workdir / "results.json").read_bytes()
    assert cli.main(["evaluate", f"--workdir={workdir}", "--client=site 021/ä"]) == 0
    assert "common_gen" in capsys.readouterr().out and (workdir / "results.json").read_bytes() == before
    assert cli.main(["export", f"--workdir={workdir}", "--client=site 021/ä", f"--out={tmp_path / 'one'}"]) == 0
    about = json.loads((tmp_path / "one" / "tap_export.json").read_text(encoding="utf-8"))
    assert about["client"] == "site 021/ä" and about["max_difference"] < 1e-4
    assert cli.main(["export", f"--workdir={workdir}", "--client=site-21", f"--out={tmp_path / 'two'}"]) == 2
    assert "client: no client 'site-21'" in capsys.readouterr().err


def test_other_clients_are_not_taken_for_these(workdir, config, tmp_path):
    """Their data may change between two calls."""
    entries = json.loads((workdir / "clients.json").read_text(encoding="utf-8"))
    (tmp_path / "clients.json").write_text(json.dumps([{"name": "elsewhere", "tasks": {"vqa": 1}}, *entries[1:]]))
    (tmp_path / "config.json").write_text((workdir / "config.json").read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(UserError, match=r"run of other clients or tasks of theirs \(elsewhere, site 000/ä\)"):
        run(load_config(config), tmp_path)


def test_describe_lists_the_first_and_the_last(config, capsys):
    assert cli.main(["describe", f"--config={config}"]) == 0
    table = capsys.readouterr().out.split("Clients x tasks, training samples\n")[1].split("\n\n")[0].splitlines()
    assert len(table) == 1 + 12 + 1 + 4 + 2
    assert ".. 184 more" in table[13]
    total = sum(sum(rows_of(n).values()) for n in range(CLIENTS))
    assert table[-2].split()[0] == "samples" and table[-2].split()[-1] == f"{total:,}"
    assert table[-1].split()[-1] == "200"


def test_a_method_with_all_of_it_and_one_of_ones_own(config):
    assert (
        len(experiments.build(load_config(config, {"method": "centralised", "variants": ()})).federation.clients) == 1
    )
