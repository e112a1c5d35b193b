"""The paper's tables from fake runs with known numbers: cells, order, marks, what is missing and what diverged."""

import numpy as np
import pytest

from tap_jax.evaluation import appendix_tables, paper_tables
from tap_jax.evaluation.finished import read_runs
from tap_jax.evaluation.selection import comparisons
from tests.evaluation.fake_runs import VILT, level, paper_federation, scores, write_run

NINE = ("Local", "FedAvg", "FedAvg + Post-train", "Per-FedAvg", "Per-FedAvg + Post-train", "DisentAFL") + (
    "DisentAFL + Post-train",
    "FedDAT",
    "FedDAT + Post-train",
)


def tables(*folders):
    """Name -> table, of runs that make one section."""
    found = comparisons(read_runs(folders)[0])
    return {table.name: table for table in paper_tables.paper_tables(found)}


def cells(table):
    """(model, label) -> cells as printed; headings under ""."""
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in paper_tables.markdown(table).splitlines()
    ]
    found, model = {"": lines[0]}, ""
    for line in lines[2:]:
        model = line[0] or model
        found[model, line[1]] = line[2:]
    return found


def test_table_2_by_hand(tmp_path):
    """FLAVA's image tasks: 3, 3, 3 and 6 owners."""
    rows = [
        *scores("tap", level(60)),
        *scores("fedavg", level(50)),
        # Client k is k off: tiny_imagenet belongs to 0, 10, 20, fashion_mnist to 8, 18, 28.
        *scores("local", level(40, step=1.0)),
    ]
    found = cells(tables(write_run(tmp_path / "run", rows))["Table 2"])
    assert found[""] == [
        "Model", "Method", "Tiny-ImageNet Acc ↑", "CIFAR-100 Acc ↑", "FMNIST MSE ↓", "Caltech-256 MSE ↓",
        "Avg. Class. Acc ↑", "Avg. Gen. MSE ↓",
    ]  # fmt: skip
    assert [label for _, label in list(found)[1:]] == [*NINE, "TAP (Ours)"]
    std = np.std([0, 10, 20])
    assert found["FLAVA", "Local"][0] == f"<u>50.00</u> ± {std:.2f}"
    assert found["FLAVA", "FedAvg"][0] == "<u>50.00</u> ± 0.00"  # equal scores share their mark
    assert found["FLAVA", "TAP (Ours)"][0] == "**60.00** ± 0.00"
    assert found["FLAVA", "FedAvg"][2] == "**0.5000** ± 0.0000"  # a lower MSE is better
    assert found["FLAVA", "Local"][2] == f"<u>0.5800</u> ± {std / 100:.4f}"
    # Caltech: clients 3, 9, 13, 19, 23, 29 are 16 off on average; three times 0.58 and six times 0.56 in the average.
    assert found["FLAVA", "Local"][5] == f"<u>{(3 * 0.58 + 6 * 0.56) / 9:.4f}</u>"
    assert found["FLAVA", "FedDAT"] == ["not run"] * 6


def test_text_table_has_both_models_with_marks_of_their_own(tmp_path):
    flava = write_run(tmp_path / "flava", [*scores("tap", level(60)), *scores("fedavg", level(50))])
    vilt = write_run(tmp_path / "vilt", [*scores("tap", level(20), "vilt"), *scores("local", level(30), "vilt")], VILT)
    table = tables(vilt, flava)["Table 3"]
    found = cells(table)
    assert found[""][2:] == [
        "AG News Acc ↑", "MMLU BS ↑", "MMLU METEOR ↑", "VQA BS ↑", "VQA METEOR ↑", "CommonGen BS ↑",
        "CommonGen METEOR ↑", "Avg. Gen. BS ↑", "Avg. Gen. METEOR ↑",
    ]  # fmt: skip
    assert [line.model for line in table.lines] == ["flava"] * 10 + ["vilt"] * 10
    assert found["FLAVA", "TAP (Ours)"][0] == "**60.00** ± 0.00"
    assert found["ViLT", "TAP (Ours)"][0] == "20.00 ± 0.00"  # of two lines only the better one is marked
    assert found["ViLT", "Local"][0] == "**30.00** ± 0.00"
    assert found["ViLT", "FedAvg"] == ["not run"] * 9


def test_two_seeds_go_into_one_mean(tmp_path):
    for seed, value in ((41, 50), (42, 60)):
        write_run(tmp_path / str(seed), scores("tap", level(value)), {"seed": seed})
    line = tables(tmp_path)["Table 2"].lines[-1]
    assert (line.seeds, line.runs) == ((41, 42), ("r1", "r2"))
    assert line.cells[0] == paper_tables.Cell("ok", 55.0, 5.0, 6)
    assert line.cells[4] == paper_tables.Cell("ok", 55.0, None, 12)


def test_diverged_is_a_dash_for_its_task_and_its_average_alone(tmp_path):
    def value(client, task, metric):
        return None if (client, task) == (8, "fashion_mnist") else 50.0

    run = write_run(tmp_path / "run", [*scores("fedavg", value), *scores("tap", level(60))])
    found = cells(tables(run)["Table 2"])
    assert found["FLAVA", "FedAvg"][2] == "—" and found["FLAVA", "FedAvg"][5] == "—"
    assert found["FLAVA", "FedAvg"][3].startswith("50.0000")
    records = paper_tables.csv_rows(tables(run)["Table 2"])
    (record,) = (r for r in records if (r["variant"], r["column"]) == ("fedavg", "FMNIST"))
    assert (record["status"], record["mean"], record["std"], record["observations"]) == ("diverged", None, None, 3)


def test_averages_of_a_centralised_run_weigh_by_the_federations_owners(tmp_path):
    write_run(tmp_path / "tap", scores("tap", level(60)))
    central = [
        {"variant": "centralised", "client": 0, "task": task, "metric": metric, "value": value}
        for task, metric, value in (("fashion_mnist", "mse", 0.9), ("caltech256", "mse", 0.3))
    ]
    write_run(tmp_path / "tap-less", central, {"method": "centralised"})
    (comparison,) = comparisons(read_runs([tmp_path])[0])
    further = paper_tables.further_table(comparison)
    assert [line.entry.label for line in further.lines] == ["Centralised (upper reference)", "TAP (Ours)"]
    average = next(
        cell
        for column, cell in zip(further.columns, further.lines[0].cells, strict=True)
        if column.tasks == ("fashion_mnist", "caltech256")
    )
    assert average.mean == pytest.approx((3 * 0.9 + 6 * 0.3) / 9)
    assert further.lines[0].cells[0].status == "not run"


def test_ablations_take_their_own_lines(tmp_path):
    variants = {"tap": 1, "tap-no-kd": 2, "fedavg+2p": 3, "tap@0.01-0.04": 4, "tap@0.05-0.1": 5, "tap-stage1": 6}
    write_run(tmp_path / "tap", [row for name, value in variants.items() for row in scores(name, level(value))])
    standard = [*scores("fedavg", level(7)), *scores("fedavg+post", level(8))]
    write_run(tmp_path / "standard", standard, {"method": "fedavg", "model.backbone": "standard"})
    found = tables(tmp_path)

    def first(name):
        return {line.entry.label: line.cells[0].mean for line in found[name].lines}

    assert first("Table 5") == {"No KD": 2, "KD": 1}
    assert first("Table 9") == {"FedAvg + 2·P": 3, "DisentAFL + 2·P": None, "TAP (Ours)": 1}
    assert first("Table 12") == {"0.01 / 0.04": 4, "0.02 / 0.05": None, "0.05 / 0.1": 5}
    assert first("Table 15") == {
        "FedAvg": 7, "FedAvg + Post-train": 8, "Per-FedAvg": None, "Per-FedAvg + Post-train": None,
        "FedDAT": None, "FedDAT + Post-train": None, "TAP (Ours)": 1,
    }  # fmt: skip
    assert first("Table 2")["FedAvg"] is None  # the routed one was not run
    assert [name for name, table in found.items() if table.empty] == []
    assert "Table 1" not in found  # nobody ran ViLT


def test_reduced_text_metrics_keep_their_names(tmp_path):
    rows = [
        {
            **row,
            "metric": {"bertscore": "bertscore_minilm", "meteor": "meteor_exact_stem"}.get(row["metric"], "accuracy"),
        }
        for row in scores("tap", level(50), tasks=("vqa", "ag_news", "mmlu", "common_gen"))
    ]
    found = cells(tables(write_run(tmp_path / "run", rows))["Table 3"])
    assert found[""][2:5] == ["AG News Acc ↑", "MMLU BS (MiniLM) ↑", "MMLU METEOR (exact+stem) ↑"]
    assert found["FLAVA", "TAP (Ours)"][-1] == "50.00"


def test_a_task_of_the_users_own_goes_into_further_runs(tmp_path):
    rows = scores("tap", level(50)) + [
        {"variant": "tap", "client": 0, "task": "own_task", "metric": "accuracy", "value": 1.0}
    ]
    (comparison,) = comparisons(read_runs([write_run(tmp_path / "run", rows)])[0])
    assert paper_tables.further_table(comparison) is not None
    assert len(tables(tmp_path / "run")["Table 2"].columns) == 6


# --- Tables 7 and 17 -----------------------------------------------------------------------------------------------


def test_table_7_from_shapes_and_what_the_runs_measured(tmp_path):
    timing = {"stage2_seconds_per_client": 2.5, "peak_host_bytes": 3 * 2**30}
    run = write_run(tmp_path / "run", scores("tap", level(50)), timing=timing)
    counted = {"total": 2.0**30, "trainable": 10.0, "percent": 1.5, "tap_total": 2.0**31, "tap_percent": 2.5}
    grid = appendix_tables.costs(comparisons(read_runs([run])[0]), lambda config: counted)
    assert [line[:2] for line in grid.lines] == [("FLAVA", "No TAP"), ("FLAVA", "TAP")]
    assert grid.lines[0][2:] == (
        "1,073,741,824.00", "10.00", "1.5000 %", "4.0000", "not run", "not run", "—",
    )  # fmt: skip
    assert grid.lines[1][4:] == ("2.5000 %", "8.0000", "3.00", "not measured", "2.50")
    assert grid.records[1]["stage2_seconds_per_client"] == 2.5


def test_table_17_counts_metrics_that_both_sides_have(tmp_path):
    def baseline(client, task, metric):
        if task == "fashion_mnist":
            return None  # diverged: beaten
        if task == "mmlu":
            return 90.0 + client / 100  # better than TAP
        return 59.5 + 10 * (client % 7) if metric != "mse" else 0.9 + client / 1000  # accuracy, text: not significant

    rows = [*scores("tap", level(60, step=0.01)), *scores("fedavg", baseline)]
    rows += scores("local", level(10, step=0.01), tasks=("ag_news", "vqa"))
    (comparison,) = comparisons(read_runs([write_run(tmp_path / "run", rows)])[0])
    grid = appendix_tables.significance([comparison])
    found = {line[1]: line[2:] for line in grid.lines}
    assert tuple(found) == NINE
    assert found["FedAvg"] == ("18.2 %", "2 of 11")  # fashion_mnist and caltech256
    assert found["Local"] == ("100.0 %", "3 of 3")
    assert found["FedDAT"] == ("not run", "not run")
    assert next(r for r in grid.records if r["baseline"] == "FedAvg")["percent"] == pytest.approx(200 / 11)


def test_the_fake_federation_is_the_papers():
    owners = {
        task: sum(task in client.shares for client in paper_federation("flava").clients) for task in ("ag_news", "vqa")
    }
    assert owners == {"ag_news": 9, "vqa": 6}
