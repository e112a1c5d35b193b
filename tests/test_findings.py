"""launch/tables/findings.py: leads have the right sign, and a first participation is no replacement."""

import pathlib
import runpy
import types

import pytest

SCRIPT = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "launch" / "tables" / "findings.py"))
SCORES = {"tap": (60.0, 0.4, 1.0), "fedavg+post": (50.0, 0.5, 1.0), "tap-stage2": (75.0, 0.4, 1.0)}


def run_of(name):
    rows = [
        {"variant": variant, "client": client, "task": task, "metric": metric, "value": value + change}
        for variant, values in (SCORES | dict.fromkeys(("tap-no-kd", "fedavg+2p"), SCORES["tap"])).items()
        for task, metric, value in (
            ("ag_news", "accuracy", values[0]),
            ("fashion_mnist", "mse", values[1]),
            ("vqa", "bertscore", 10 * values[2]),
            ("vqa", "meteor", values[2]),
        )
        for client, change in ((0, -0.1), (1, 0.1))
    ]
    both = {"0": {"ag_news": 1.0, "vqa": 1.0}, "1": {"vqa": 1.0}}
    events = [(0, 0, "ag_news"), (0, 0, "vqa"), (0, 1, "vqa"), (1, 0, "vqa"), (2, 0, "vqa"), (2, 1, "vqa")]
    lines = [
        {
            "losses": {"federated": both},
            "replacements": [
                {"client": k, "task": task, "variant": variant}
                for when, k, task in events
                for variant in ("tap", "tap@0.1")
                if when == number
            ],
        }
        for number in range(3)
    ]
    return types.SimpleNamespace(folder=pathlib.Path(name), rows=rows, lines=lambda: lines)


def test_a_lead_is_relative_and_positive_where_tap_is_better():
    found = SCRIPT["leads"](run_of("flava-tap-51"))
    assert found["fedavg+post"] == pytest.approx({"ag_news": 20, "fashion_mnist": 20, "vqa": 0})
    assert found["tap-stage2"] == pytest.approx({"ag_news": -20, "fashion_mnist": 0, "vqa": 0})


def test_the_first_participation_is_not_counted():
    assert SCRIPT["taken_over"](run_of("flava-tap-51")) == 3 / 6


def test_changes_are_lines_and_seeds_are_averaged(tmp_path, monkeypatch, capsys):
    runs = [run_of(name) for name in ("flava-tap-51", "flava-tap-52", "change-rounds-14-51")]
    monkeypatch.setitem(SCRIPT["main"].__globals__, "read_runs", lambda folders: (runs, ["a note"]))
    assert SCRIPT["main"]([str(tmp_path), f"--out={tmp_path / 'out'}"]) == 0
    text = (tmp_path / "out" / "findings.md").read_text()
    assert text + "\n" == capsys.readouterr().out and text.endswith("a note\n")
    assert "| none | 2 | 50 % | +13.3 ± 0.0 | +0.0 ± 0.0 | -6.7 ± 0.0 | +0.0 ± 0.0 |" in text
    assert "| rounds-14 | +20.0 | +20.0 | +0.0 |" in text


def test_a_folder_without_runs_is_one_line(tmp_path, capsys):
    assert SCRIPT["main"]([str(tmp_path / "none"), f"--out={tmp_path / 'out'}"]) == 2
    assert capsys.readouterr().err.startswith("findings: report: no folder") and not (tmp_path / "out").exists()
