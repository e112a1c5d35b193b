"""Tasks that a configuration declares: trained, resumed, evaluated, reported and exported with nothing registered."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from tap_jax.cli import main as cli
from tap_jax.config import load_config
from tap_jax.errors import UserError
from tap_jax.experiment import build
from tap_jax.runs import run_folder
from tap_jax.tasks import TASKS
from tests.conftest import TINY

torch_model = pytest.importorskip("tap_jax.export.torch_model")
torch = pytest.importorskip("torch")

WARDS = ("north", "south")
FINDINGS = ("clear", "shadow", "fracture")  # in another order than the alphabet's, which the map follows
TASK_FIELDS = {
    "scans": {"kind": "image_classification", "image": "image", "label": "label"},
    "letters": {
        "kind": "text_classification",
        "text": "To {ward:words}: {body}",
        "label": "finding",
        "domain_column": "ward",
    },
    "replies": {"kind": "text_generation", "text": "{body}", "answer": "Finding: {finding}", "domains": "letters_in"},
}


def write(root):
    """Pictures in a folder per class, and csv with labels in words."""
    rng = np.random.default_rng(0)
    for split, size in (("train", 6), ("test", 2)):
        for number, finding in enumerate(FINDINGS):
            place = root / "pictures" / split / finding
            place.mkdir(parents=True)
            for i in range(size):
                pixels = np.clip(rng.normal(60 + 60 * number, 20, (16, 16)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{i}.png")
        (root / "texts").mkdir(exist_ok=True)
        with open(root / "texts" / f"{split}.csv", "w", newline="") as stream:
            rows = csv.writer(stream)
            rows.writerow(("body", "finding", "ward", "hospital"))
            for i in range(8 * size):
                finding = FINDINGS[i % 3]
                rows.writerow((f"there is a {finding} in view {i}", finding, WARDS[i % 2], f"hospital {i % 3}"))


def forget():
    """What another process would not know."""
    for name in TASK_FIELDS:
        TASKS.pop(name, None)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("declared")
    write(folder)
    fields = TINY | {
        "rounds": 1,
        "data.train_size": 18,
        "data.test_size": 4,
        "federation.rows": ({"scans": 1.0, "letters": 0.5}, {"letters": 0.5, "replies": 1.0}),
        "data.cache_dir": str(folder / "cache"),
    }
    (folder / "mine.py").write_text(f"""
from tap_jax.config import default_config, override

def get_config(argument=""):
    config = override(default_config(), {fields!r})
    config.tasks = {TASK_FIELDS!r}
    config.tasks.scans.path = {str(folder / "pictures")!r}
    config.tasks.letters.path = config.tasks.replies.path = {str(folder / "texts")!r}
    return override(config, argument)
""")
    yield folder
    forget()


@pytest.fixture(scope="module")
def workdir(place):
    forget()
    assert cli.main(["train", f"--config={place}/mine.py", f"--workdir={place}/run"]) == 0
    return place / "run"


def test_describe(place, capsys):
    forget()
    assert cli.main(["describe", f"--config={place}/mine.py"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in TASK_FIELDS)


def test_a_run_keeps_what_its_data_said(workdir):
    kept = json.loads((workdir / "config.json").read_text())["tasks"]
    assert kept["letters"]["class_names"] == sorted(FINDINGS) and kept["letters"]["domains"] == list(WARDS)
    assert kept["scans"]["class_names"] == sorted(FINDINGS) and kept["scans"]["classes"] == 3
    results = json.loads((workdir / "results.json").read_text())["results"]
    assert {row["task"] for row in results} == set(TASK_FIELDS)


def test_other_commands_need_no_registration(place, workdir, capsys):
    for argv in (
        ("train", f"--config={place}/mine.py", f"--workdir={workdir}"),  # finished: it says so
        ("evaluate", f"--workdir={workdir}"),
        ("report", str(workdir), f"--out={place}/report"),
        ("export", f"--workdir={workdir}", "--client=0", f"--out={place}/out"),
    ):
        forget()
        assert cli.main(list(argv)) == 0, capsys.readouterr().err
    assert "letters" in (place / "report" / "report.md").read_text()


def test_an_export_has_the_names_of_classes(place, workdir):
    if not (place / "out").exists():
        forget()
        assert cli.main(["export", f"--workdir={workdir}", "--client=0", f"--out={place}/out"]) == 0
    model = torch_model.load(place / "out")
    described = model.config["tasks"]["letters"]
    assert described["class_names"] == sorted(FINDINGS) and described["text"] == TASK_FIELDS["letters"]["text"]
    tokens = torch.tensor([[2, 7, 3]])
    assert model("letters", domain="south", tokens=tokens).shape == (1, 3)
    assert "text_classification of clear, fracture, shadow" in (place / "out" / "README.md").read_text()


def test_other_classes_are_another_run(place, workdir, capsys):
    """Resuming on data with a class more is refused, with the field that differs."""
    with open(place / "texts" / "train.csv", "a", newline="") as stream:
        csv.writer(stream).writerow(("there is nothing", "nothing", "north", "hospital 0"))
    try:
        assert cli.main(["train", f"--config={place}/mine.py", f"--workdir={workdir}"]) == 2
        assert "tasks.letters.class_names" in capsys.readouterr().err
    finally:
        lines = (place / "texts" / "train.csv").read_text().splitlines()
        (place / "texts" / "train.csv").write_text("\n".join(lines[:-1]) + "\n")


def test_clients_by_a_column(place, tmp_path):
    """A column names the clients; the rows are where the tasks say. A run goes on only with as many samples of each."""
    fields = {
        "federation.split": "column",
        "data.client_column": "hospital",
        "federation.tasks": ("letters", "replies"),
    }
    fields |= {"federation.table": "flava", "federation.rows": (), "cohort_size": 1}
    experiment = build(load_config(place / "mine.py", fields))
    assert [client.name for client in experiment.federation.clients] == ["hospital 0", "hospital 1", "hospital 2"]
    assert experiment.model.tasks[0].class_names == tuple(sorted(FINDINGS))
    run_folder.begin(tmp_path, experiment)
    run_folder.begin(tmp_path, experiment)
    kept = json.loads((tmp_path / "clients.json").read_text())
    kept[1]["tasks"]["letters"] += 1
    (tmp_path / "clients.json").write_text(json.dumps(kept))
    before = (tmp_path / "clients.json").read_bytes()
    with pytest.raises(UserError, match="holds a run in which hospital 1 has .* samples of letters, and now"):
        run_folder.begin(tmp_path, experiment)
    assert (tmp_path / "clients.json").read_bytes() == before
