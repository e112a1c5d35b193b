"""Summaries, tables and files on numbers that can be checked by hand."""

import json
import math

import numpy as np
import pytest

from tap_jax.errors import UserError
from tap_jax.evaluation import results
from tap_jax.evaluation.scores import find_metric, summarise
from tap_jax.evaluation.tables import markdown_table, text_table
from tests.evaluation.test_page import check_page


def scores(variant, task, metric, *values):
    """One row per client, clients 0, 1, ..."""
    return [
        {"variant": variant, "client": client, "task": task, "metric": metric, "value": value}
        for client, value in enumerate(values)
    ]


# fashion_mnist has three clients, caltech256 one: Avg. = (3·mean + 1·mean) / 4.
ROWS = [
    *scores("fedavg", "fashion_mnist", "mse", 0.4, 0.6, 0.8),
    *scores("fedavg", "caltech256", "mse", 0.2),
    *scores("fedavg", "ag_news", "accuracy", 90.0, 92.0),
    *scores("tap", "fashion_mnist", "mse", 0.3, 0.3, 0.3),
    *scores("tap", "caltech256", "mse", 0.5),
    *scores("tap", "ag_news", "accuracy", 92.004, 94.0),
    *scores("local", "fashion_mnist", "mse", 0.9, None, 0.8),
    *scores("local", "caltech256", "mse", 0.3),
]


def cells(table):
    """Markdown table -> {variant: [cell, ...]}, the labels of its lines under ""."""
    lines = [[cell.strip() for cell in line.strip()[1:-1].split("|")] for line in table.splitlines()]
    return {column[0]: list(column[2:]) for column in zip(*lines, strict=True)}


def test_summary_is_mean_and_population_std():
    summary = summarise(ROWS)
    assert summary[0] == {
        "variant": "fedavg",
        "task": "fashion_mnist",
        "metric": "mse",
        "mean": pytest.approx(0.6),
        "std": pytest.approx(math.sqrt((0.04 + 0 + 0.04) / 3)),
        "clients": 3,
        "observations": 3,
    }
    assert [(s["variant"], s["task"]) for s in summary[-2:]] == [("local", "fashion_mnist"), ("local", "caltech256")]


@pytest.mark.parametrize("bad", [None, float("nan"), float("inf")])
def test_one_diverged_client_makes_the_task_diverged_for_all_its_metrics(bad):
    rows = [*scores("tap", "vqa", "bertscore", 50.0, bad), *scores("tap", "vqa", "meteor", 20.0, 30.0)]
    assert [(s["mean"], s["std"], s["clients"]) for s in summarise(rows)] == [(None, None, 2)] * 2


def test_rows_of_two_seeds_count_their_clients_once():
    rows = scores("tap", "ag_news", "accuracy", 90.0, 92.0) + scores("tap", "ag_news", "accuracy", 94.0, 96.0)
    (summary,) = summarise(rows)
    assert (summary["mean"], summary["clients"], summary["observations"]) == (93.0, 2, 4)
    assert summary["std"] == pytest.approx(math.sqrt((9 + 1 + 1 + 9) / 4))


def test_markdown_table_has_a_line_per_task_and_a_column_per_variant():
    assert markdown_table(ROWS).splitlines()[:3] == [
        "| | fedavg | tap | local |",
        "|:--|--:|--:|--:|",
        "| fashion_mnist MSE ↓ | <u>0.6000</u> ± 0.1633 | **0.3000** ± 0.0000 | — |",
    ]


def test_markdown_table_by_hand():
    assert cells(markdown_table(ROWS)) == {
        "": ["fashion_mnist MSE ↓", "caltech256 MSE ↓", "ag_news Acc ↑", "Avg. Gen. MSE ↓"],
        "fedavg": ["<u>0.6000</u> ± 0.1633", "**0.2000** ± 0.0000", "<u>91.00</u> ± 1.00", "<u>0.5000</u>"],
        "tap": ["**0.3000** ± 0.0000", "0.5000 ± 0.0000", "**93.00** ± 1.00", "**0.3500**"],
        "local": ["—", "<u>0.3000</u> ± 0.0000", "", "—"],
    }


def test_averages_are_the_papers_and_need_all_their_tasks():
    """Table 3, FLAVA, FedAvg: 3 MMLU, 6 VQA and 6 CommonGen clients average to 34.52 and 10.86."""
    means = {"mmlu": (37.83, 7.71, 3), "vqa": (37.68, 10.84, 6), "common_gen": (29.70, 12.46, 6)}
    rows = [
        row
        for task, (bertscore, meteor, clients) in means.items()
        for row in (
            *scores("fedavg", task, "bertscore", *[bertscore] * clients),
            *scores("fedavg", task, "meteor", *[meteor] * clients),
        )
    ]
    rows += scores("partial", "vqa", "bertscore", 1.0)
    table = cells(markdown_table(rows))
    assert table[""][-2:] == ["Avg. Gen. BS ↑", "Avg. Gen. METEOR ↑"]
    assert table["fedavg"][-2:] == ["34.52", "10.86"]
    assert table["partial"][-2:] == ["", ""]


def test_class_average_covers_image_classification_only():
    rows = [
        *scores("tap", "tiny_imagenet", "accuracy", 40.0),
        *scores("tap", "cifar100", "accuracy", 60.0),
        *scores("tap", "ag_news", "accuracy", 0.0),
    ]
    table = cells(markdown_table(rows))
    assert table[""] == ["tiny_imagenet Acc ↑", "cifar100 Acc ↑", "ag_news Acc ↑", "Avg. Class. Acc ↑"]
    assert table["tap"][-1] == "50.00"


def test_scores_that_print_alike_share_their_mark():
    rows = [row for v, x in (("a", 1.001), ("b", 1.002), ("c", 0.9)) for row in scores(v, "ag_news", "accuracy", x)]
    table = cells(markdown_table(rows))
    assert [table[v][0].split()[0] for v in "abc"] == ["**1.00**", "**1.00**", "<u>0.90</u>"]


def test_a_lone_variant_is_not_marked():
    assert "**" not in markdown_table(scores("tap", "ag_news", "accuracy", 1.0))
    assert "*" not in text_table(scores("tap", "ag_news", "accuracy", 1.0))


def test_metric_of_another_model_is_shown_under_its_own_heading():
    assert find_metric("bertscore_my_bert") == ("BS (my_bert)", True, 2)
    assert find_metric("meteor_exact_stem").label == "METEOR (exact+stem)"
    with pytest.raises(UserError, match="unknown metric 'bleu'"):
        markdown_table(scores("tap", "vqa", "bleu", 1.0))


def test_text_table_turns_and_aligns():
    assert text_table(ROWS).splitlines() == [
        "                            fedavg             tap           local",
        "fashion_mnist MSE ↓  0.6000±0.1633   0.3000±0.0000*              —",
        "caltech256 MSE ↓     0.2000±0.0000*  0.5000±0.0000   0.3000±0.0000",
        "ag_news Acc ↑           91.00±1.00      93.00±1.00*",
        "Avg. Gen. MSE ↓             0.5000          0.3500*              —",
    ]


def test_text_table_drops_the_std_then_breaks_into_blocks():
    assert text_table(ROWS, width=55).splitlines()[1] == "fashion_mnist MSE ↓  0.6000   0.3000*       —"
    narrow = text_table(ROWS, width=40).splitlines()
    assert max(map(len, narrow)) <= 40
    assert [line.split() for line in narrow if "Acc" not in line and "MSE" not in line] == [
        ["fedavg", "tap"],
        [],
        ["local"],
    ]


def test_text_table_with_the_papers_ten_methods_stays_within_the_width():
    names = [
        "local",
        *(f"{m}{post}" for m in ("fedavg", "per-fedavg", "disentafl", "feddat") for post in ("", "+post")),
    ]
    rows = [row for name in (*names, "tap") for row in scores(name, "caltech256", "mse", 0.5, 0.25)]
    assert max(map(len, text_table(rows).splitlines())) <= 100


def test_no_rows_make_no_table():
    assert markdown_table([]) == text_table([]) == "No results.\n"


def strict(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is not strict JSON")

    return json.loads(text, parse_constant=refuse)


def test_results_are_written_as_strict_json_with_a_report(tmp_path):
    config = {"method": "tap", "model": {"name": "mini"}, "margins": (0.1, float("inf")), "seed": np.int64(41)}
    rows = [*ROWS, *scores("tap", "cifar100", "accuracy", float("nan"), np.float32(0.5))]
    replacements = [{"round": 1, "client": np.int32(2), "task": "ag_news"}, {"round": 2, "client": 0, "task": "vqa"}]
    folder = tmp_path / "new" / "run"
    origin = {"config_hash": "ab12", "versions": {"jax": "0.10.2"}}
    replacements.append({"round": 2, "client": 0, "task": "vqa", "variant": "tap@0.05"})
    notes = ("meteor lacks WordNet",)
    timing = {"total_seconds": 61.25, "device": "1 x cpu", "peak_host_bytes": 6_365_429_760, "own_s": 1.5}
    results.write_results(folder, config, rows, replacements, timing, notes=notes, **origin)

    read = strict((folder / "results.json").read_text())
    assert list(read) == ["config", "config_hash", "versions", "results", "replacements", "timing"]
    assert {name: read[name] for name in origin} == origin
    assert read["config"] == {"method": "tap", "model": {"name": "mini"}, "margins": [0.1, "inf"], "seed": 41}
    assert [row["value"] for row in read["results"][-2:]] == [None, 0.5]
    assert read["results"][: len(ROWS)] == ROWS
    assert read["replacements"][0] == {"round": 1, "client": 2, "task": "ag_news"}
    assert read["timing"] == timing

    report = (folder / "report.md").read_text()
    assert markdown_table(read["results"]) in report
    assert report.startswith("# `run`: method tap, model mini\n\nseed 41\n\n| | fedavg | tap | local |\n")
    assert "Note: meteor lacks WordNet" in report
    assert "2 (ag_news 1, vqa 1)" in report
    assert "Timing: in all 61.25 s, device 1 x cpu, peak memory of the host 6.365 GB, own_s 1.5.\n" in report
    assert "— diverged (the model holds" in report
    found = check_page((folder / "report.html").read_text(), report)
    assert "<title>run: method tap, model mini</title>" in (folder / "report.html").read_text()
    assert [attributes["scope"] for _, attributes, _ in found.tables[0][0]] == ["col"] * 4
    assert all([tag for tag, _, _ in line] == ["th", "td", "td", "td"] for line in found.tables[0][1:])
    assert any("Note: meteor lacks WordNet" in text for text in found.text)
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "report.md", "results.json"]


@pytest.mark.parametrize("name", ["a_b_c", "*a*", "<script>alert(1)</script>", "a\n# b"])
def test_the_title_names_the_folder_whatever_it_is_called(name, tmp_path):
    folder = tmp_path / name.replace("/", "")
    results.write_results(folder, {"method": "tap", "rounds": 3}, ROWS, [], {})
    report = (folder / "report.md").read_text()
    found = check_page((folder / "report.html").read_text(), report)
    assert f"{' '.join(folder.name.split())}: method tap" in "".join(found.text) and len(found.all("h1")) == 1


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    results.write_results(tmp_path, {}, ROWS, [], {})
    before = (tmp_path / "results.json").read_text()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        results.write_results(tmp_path, {}, [], [], {})
    assert (tmp_path / "results.json").read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.md", "results.json"]
