"""launch/tables/learning_rates.py: which rate has the least held-out loss, and what is not trained twice."""

import csv
import importlib.util
import pathlib

import numpy as np
import pytest

from tap_jax.config import to_json

SCRIPT = pathlib.Path(__file__).parents[1] / "launch" / "tables" / "learning_rates.py"
ROWS = ({"ag_news": 0.3}, {"cifar100": 0.5, "ag_news": 0.6}, {"cifar100": 0.4})


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("learning_rates", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Rate -> losses of two tasks; task b's are a hundred times as large. 0.2 is best at a and 0.1 at b, by less.
LOSSES = {0.1: {"a": 1.2, "b": 100.0}, 0.2: {"a": 1.0, "b": 110.0}, 0.4: {"a": 2.0, "b": np.inf}}


def test_tasks_count_alike_whatever_their_units(script, monkeypatch, tmp_path, capsys):
    asked = []

    def losses(config, method, rate, seed):
        asked.append((config, method, rate, seed))
        return {task: loss * seed for task, loss in LOSSES[rate].items()}

    monkeypatch.setattr(script, "losses", losses)
    arguments = ["mine.py", f"--out={tmp_path}/rates", "--rates", "0.1", "0.2", "0.4", "--seeds", "3", "5"]
    assert script.main([*arguments, "--methods", "local"]) == 0
    assert asked == [("mine.py", "local", rate, seed) for seed in (3, 5) for rate in LOSSES]
    assert capsys.readouterr().out.splitlines()[-1] == "| local | 1.100 | 1.050 | inf | 0.2 |"
    with open(tmp_path / "rates" / "losses.csv") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 12
    assert lines[0] == {"method": "local", "rate": "0.1", "seed": "3", "task": "a", "loss": str(3 * 1.2)}
    asked.clear()
    assert script.main([*arguments, "--methods", "local", "fedavg"]) == 0
    assert {method for _, method, _, _ in asked} == {"fedavg"} and len(asked) == 6
    assert capsys.readouterr().out.splitlines()[-2:] == [
        f"| {method} | 1.100 | 1.050 | inf | 0.2 |" for method in ("local", "fedavg")
    ]
    # A table is of the seeds that are asked for, whatever else was measured.
    monkeypatch.setattr(script, "losses", lambda config, method, rate, seed: {"a": 1 / rate, "b": 1 / rate})
    assert script.main([*arguments[:-2], "7", "--methods", "local"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "| local | 4.000 | 2.000 | 1.000 | 0.4 |"


def test_losses_of_a_run(script, tiny, tmp_path):
    """A larger rate is another loss; the same rate and seed are the same."""
    (tmp_path / "tiny.json").write_text(to_json(tiny(ROWS, {"rounds": 2, "data.held_out": 0.3})))
    first, again, other = (script.losses(f"{tmp_path}/tiny.json", "local", rate, 101) for rate in (1e-3, 1e-3, 1e-2))
    assert set(first) == {"ag_news", "cifar100"} and all(np.isfinite(list(first.values())))
    assert first == again and all(first[task] != other[task] for task in first)


def test_a_configuration_that_is_not_there_is_one_line(script, tmp_path, capsys):
    assert script.main(["nowhere.py", f"--out={tmp_path}/rates"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("learning_rates: ") and "nowhere.py" in line
