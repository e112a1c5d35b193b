"""The report as a whole: files, links, figures, samples, sources; and folders that it must not touch."""

import csv
import io
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

from tap_jax.cli import main as cli
from tap_jax.cli.arguments import parse
from tap_jax.cli.commands import COMMANDS
from tap_jax.errors import UserError
from tap_jax.evaluation import curves, drawing, heat_map, report
from tap_jax.evaluation.finished import read_runs
from tap_jax.evaluation.page import html_page
from tap_jax.evaluation.samples import ImageSample, TextSample, read_samples, to_uint8, write_samples
from tap_jax.evaluation.selection import comparisons
from tests.evaluation.fake_runs import VILT, level, replaced, scores, training_lines, write_run
from tests.evaluation.test_page import check_page

MARGINS = ("tap", "tap@0.01-0.04", "tap@0.05-0.1")


def counted(config):
    return {"total": 100.0, "trainable": 10.0, "percent": 10.0, "tap_total": 110.0, "tap_percent": 18.0}


def sample_images():
    shade = np.arange(4, dtype=np.uint8)[:, None, None, None] * np.full((64, 64, 3), 60, np.uint8)
    return [ImageSample("tap", 8, "fashion_mnist", n, shade[n], 255 - shade[n]) for n in range(4)]


TEXTS = [
    TextSample("tap", 4, "vqa", 0, "question : red ?", "answer : yes", ("answer : yes",)),
    TextSample("tap", 4, "vqa", 1, "", "a | b\nc", ("answer : no", "answer : none")),
    TextSample("tap", 5, "vqa", 0, "", "<script>alert(1)</script> & **bold** `x`", ("answer : no",)),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """FLAVA with two seeds of TAP, margins, losses and samples; ViLT with one; a baseline of seed 41."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (41, 42):
        rows = [
            row for n, name in enumerate((*MARGINS, "fedavg", "fedavg+post")) for row in scores(name, level(60 - n))
        ]
        events = replaced(variants=MARGINS, seed=seed)
        write_run(folder / f"tap{seed}", rows, {"seed": seed}, replacements=events, lines=training_lines(seed=seed))
    write_samples(folder / "tap41" / "samples", [*TEXTS, *sample_images()])
    events = replaced("vilt")
    write_run(
        folder / "vilt", scores("tap", level(50), "vilt"), VILT, replacements=events, lines=training_lines("vilt")
    )
    fields = {"method": "per_fedavg"}
    write_run(folder / "per", scores("per-fedavg", level(40)), fields, lines=training_lines(models=("federated",)))
    return folder


@pytest.fixture(scope="module")
def made(runs, tmp_path_factory):
    """(the report's folder, what write_report returned)."""
    out = tmp_path_factory.mktemp("reports") / "all"
    return out, report.write_report([runs], out, parameters=counted)


def read_csv(path):
    return list(csv.DictReader(io.StringIO(path.read_text())))


def test_all_files_are_there_and_linked(made):
    out, files = made
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()) == files
    text = (out / "report.md").read_text()
    links = set(re.findall(r"\]\(([^)]+)\)", text))
    assert links == set(files) - {"report.md", "report.html"}
    numbers = [int(number) for number in re.findall(r"^### Table (\d+)\.", text, re.MULTILINE)]
    assert numbers == sorted(numbers)
    numbers += [int(number) for number in re.findall(r"\[Table (\d+)\]", text)]  # not run
    assert sorted(numbers) == list(range(1, 18))
    assert {f"tables/table_{number:02}.csv" for number in numbers} <= set(files)
    assert [path.name for path in out.parent.iterdir()] == ["all"]


def test_the_page_has_all_of_the_report_and_needs_no_file(made):
    out, files = made
    page, markdown = (out / "report.html").read_text(), (out / "report.md").read_text()
    found = check_page(page, markdown, files)
    assert len(found.all("img")) == sum(name.startswith("figures/") for name in files)
    assert {link["href"] for link in found.all("a") if not link["href"].startswith("#")} == set(files) - {
        "report.md",
        "report.html",
    }
    assert "<script>" in found.tables[-2][-1][3][2]  # what a model wrote
    figures = {name: (out / name).read_bytes() for name in files if name.startswith("figures/")}
    assert html_page(markdown, figures) == page


def test_csv_has_every_cell_unrounded_with_its_runs(made):
    out, _ = made
    rows = read_csv(out / "tables" / "table_02.csv")
    assert len(rows) == 10 * 6
    tap = next(row for row in rows if (row["variant"], row["column"]) == ("tap", "CIFAR-100"))
    assert tap == {
        "experiment": "", "model": "FLAVA", "method": "TAP (Ours)", "backbone": "routed", "variant": "tap",
        "column": "CIFAR-100", "metric": "accuracy", "status": "ok", "mean": "60.0", "std": "0.0", "observations": "6",
        "seeds": "41 42", "runs": "r2 r3",
    }  # fmt: skip
    missing = next(row for row in rows if row["variant"] == "feddat")
    assert (missing["status"], missing["mean"], missing["runs"]) == ("not run", "", "")
    assert [row["run"] for row in read_csv(out / "tables" / "runs.csv")] == ["r1", "r2", "r3", "r4"]


def test_sources_name_folder_hash_seed_and_versions(made, runs):
    text = (made[0] / "report.md").read_text()
    _, table = text.split("## Sources")
    line = next(line for line in table.splitlines() if line.startswith("| r3 |"))
    full = next(row for row in read_csv(made[0] / "tables" / "runs.csv") if row["run"] == "r3")
    assert len(full["config_hash"]) == 64 and f"`{full['config_hash'][:12]}`" in line
    assert f"`{runs / 'tap42'}` " in line and "| 42 | tap | FLAVA | routed | 1 x cpu |" in line
    assert "python=3.11 jax=0.10.2" in line
    assert "Seeds differ: " in text and "FLAVA Per-FedAvg 41" in text
    assert "### Table 14. " not in text
    (absent,) = (line for line in text.splitlines() if line.startswith("Not run, but for TAP at most: "))
    assert "[Table 14](tables/table_14.csv)" in absent


def test_runs_of_different_devices_are_told_apart(tmp_path):
    write_run(tmp_path / "a", scores("tap", level(1)))
    write_run(tmp_path / "b", scores("tap", level(2)), {"seed": 42}, timing={"device": "1 x gpu"})
    text = report.compose(*read_runs([tmp_path]), counted)["report.md"].decode()
    assert "- FLAVA runs differ in device (r1: 1 x cpu; r2: 1 x gpu)." in text and "differ in versions" not in text


def test_figures_are_pictures_of_a_legible_size(made):
    out, files = made
    names = [name for name in files if name.startswith("figures/")]
    assert names == [
        f"figures/{name}.png"
        for name in (
            "figure_03", "figure_04_flava", "gains_flava", "images_flava", "losses_flava_per_fedavg",
            "losses_flava_tap", "losses_vilt_tap",
        )
    ]  # fmt: skip
    for name in names:
        with Image.open(out / name) as picture:
            pixels = np.asarray(picture.convert("RGB"), int)
        assert min(pixels.shape[:2]) >= 300 and max(pixels.shape[:2]) <= 2600, name
        assert pixels.std() > 5, name


def test_figure_3_counts_replacements(runs):
    found = comparisons(read_runs([runs])[0])
    figure = curves.replacements(found)
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["FLAVA (mean of 2 seeds)", "ViLT"]
    events = [event for run in found[0].runs for event in run.replacements if event["variant"] == "tap"]
    ends = sum(line.get_ydata()[-1] for line in figure.axes[0].get_lines())
    assert ends == len(events) / 2
    assert curves.cumulative([{"round": 1, "task": "vqa"}, {"round": 1, "task": "vqa"}], "vqa", 3).tolist() == [0, 2, 2]
    labels = [text.get_text() for text in curves.margins(found[0]).legends[0].get_texts()]
    assert labels == ["0.005 / 0.01 (the run's own)", "0.01 / 0.04", "0.05 / 0.1"]
    assert curves.margins(found[1]) is None


def test_figure_4_knows_margins_in_any_name(tmp_path):
    """Tiny margins, and a run that differs in more than margins."""
    events = [
        {"round": 0, "client": 0, "task": "ag_news", "variant": name}
        for name in ("tap", "tap@0.5", "tap@1e-05", "tap@1e-05-0.1")
    ]
    rows = [row for event in events for row in scores(event["variant"], level(1))]
    write_run(tmp_path / "a", rows, replacements=events, extra={"margins": [0.02, 0.5, 1e-5, [1e-5, 0.1]]})
    others = {"margins": 0.03, "replacement.scope": "exclusive"}
    write_run(tmp_path / "b", scores("tap", level(2)), others, replacements=events[:1])
    (found,) = comparisons(read_runs([tmp_path])[0])
    labels = [text.get_text() for text in curves.margins(found).legends[0].get_texts()]
    assert labels == [
        "0.02 (the run's own)", "1e-05", "1e-05 / 0.1", "0.5", "0.03 (replacement.scope=exclusive)",
    ]  # fmt: skip


def test_a_running_mean_looks_both_ways():
    assert curves.running_mean([0, 1, 5], np.array([1.0, 3.0, 7.0]), 1).tolist() == [2.0, 2.0, 7.0]


def test_gain_is_in_percent_and_knows_directions(runs):
    found = heat_map.gains(comparisons(read_runs([runs])[0])[0])
    metric, score, gain = found[0, "tiny_imagenet"]
    assert (metric, score, gain) == ("accuracy", 60.0, pytest.approx(100 * 4 / 56))
    assert found[8, "fashion_mnist"][2] == pytest.approx(-100 * 4 / 56)
    assert found[4, "vqa"][0] == "meteor"


def test_gains_are_in_the_order_of_the_scores(runs):
    """What is drawn later lies above: in a set's order the picture would change from process to process."""
    (comparison, *_) = comparisons(read_runs([runs])[0])
    scored = list(heat_map.client_scores(comparison, "tap"))
    found = list(heat_map.gains(comparison))
    assert len(found) > 4 and found == [key for key in scored if key in found]


def test_gains_of_many_clients_are_a_spread(tmp_path):
    """A map of thousands would be a picture wider than can be drawn."""
    rows = [
        {"variant": variant, "client": client, "task": "ag_news", "metric": "accuracy", "value": value}
        for client in range(3000)
        for variant, value in (("tap", 50.0 + client % 2), ("fedavg+post", 50.0))
    ]
    write_run(tmp_path / "many", rows)
    (found,) = comparisons(read_runs([tmp_path])[0])
    figure = heat_map.gain_map(found)
    assert figure.get_size_inches().max() < 12
    curve = figure.axes[0].get_lines()[0]
    assert curve.get_xdata().tolist() == [0.0] * 1500 + [2.0] * 1500 and curve.get_ydata()[1499] == 50
    drawing.png(figure)


def test_sample_texts_stay_in_their_cells(made):
    text = (made[0] / "report.md").read_text()
    assert "| VQA | 4 | question : red ? | answer : yes | answer : yes |" in text
    assert "|  |  |  | a \\| b c | answer : no *(and 1 more)* |" in text


# --- samples -------------------------------------------------------------------------------------------------------


def test_samples_are_read_as_written(tmp_path):
    assert read_samples(tmp_path / "samples") == []
    write_samples(tmp_path / "samples", [])
    assert not (tmp_path / "samples").exists()
    write_samples(tmp_path / "samples", [*TEXTS, *sample_images()])
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["images.npz", "texts.json"]
    found = read_samples(tmp_path / "samples")
    assert found[: len(TEXTS)] == TEXTS
    for mine, stored in zip(sample_images(), found[len(TEXTS) :], strict=True):
        assert (stored.task, stored.client, stored.example) == (mine.task, mine.client, mine.example)
        np.testing.assert_array_equal(stored.reconstruction, mine.reconstruction)
    (tmp_path / "samples" / "images.npz").write_bytes(b"PK")
    with pytest.raises(UserError, match="images.npz is broken .*remove it"):
        read_samples(tmp_path / "samples")


def test_pixels_come_back_from_standardised_units():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3)).astype(np.uint8)
    from tap_jax.data.device_data import standardise

    np.testing.assert_array_equal(to_uint8(np.asarray(standardise(pixels))), pixels)
    assert to_uint8(np.array([[-99.0, 99.0, np.nan]])).tolist() == [[0, 255, 0]]


# --- several experiments -------------------------------------------------------------------------------------------


def test_two_experiments_of_a_model_never_share_a_table(tmp_path):
    for rounds, score in ((20, 60), (30, 40)):
        write_run(tmp_path / str(rounds), scores("tap", level(score)), {"rounds": rounds}, lines=training_lines())
    files = report.compose(*read_runs([tmp_path]), counted)
    text = files["report.md"].decode()
    first, second = text.split("# Experiment 2: FLAVA with rounds=30")
    assert "# Experiment 1: FLAVA with rounds=20" in first
    assert first.count("### Table 2.") == second.count("### Table 2.") == 1
    assert "60.00 ± 0.00" in first and "60.00" not in second.split("## Sources")[0]
    rows = list(csv.DictReader(io.StringIO(files["tables/table_02.csv"].decode())))
    assert [(row["experiment"], row["mean"]) for row in rows if row["mean"]][0::6] == [("1", "60.0"), ("2", "40.0")]
    assert {"figures/experiment1_losses_flava_tap.png", "figures/experiment2_losses_flava_tap.png"} <= set(files)


# --- folders -------------------------------------------------------------------------------------------------------


def test_an_earlier_report_is_replaced_and_nothing_else(tmp_path):
    run = write_run(tmp_path / "run", scores("tap", level(50)))
    out = tmp_path / "out"
    report.write_report([run], out, parameters=counted)
    (out / "figures").mkdir(exist_ok=True)
    (out / "figures" / "stale.png").write_bytes(b"")
    report.write_report([run], out, parameters=counted)
    assert not (out / "figures" / "stale.png").exists()

    (out / "thoughts.txt").write_text("mine")
    with pytest.raises(UserError, match="out: .*thoughts.txt, which is no report's; name a new or empty folder"):
        report.write_report([run], out, parameters=counted)
    with pytest.raises(UserError, match="out: .*config.json"):
        report.write_report([run], run, parameters=counted)
    with pytest.raises(UserError, match="is a file"):
        report.write_report([run], run / "config.json", parameters=counted)
    empty = tmp_path / "deep" / "empty"
    empty.mkdir(parents=True)
    report.write_report([run], empty, parameters=counted)
    assert (empty / "report.md").is_file() and (empty / "report.html").is_file()


def test_a_failure_leaves_the_old_report(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", scores("tap", level(50)))
    out = tmp_path / "out"
    report.write_report([run], out, parameters=counted)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    monkeypatch.setattr(report, "compose", lambda *args: {"report.md": b"new", "tables/x.csv": None})
    with pytest.raises(TypeError):
        report.write_report([run], out, parameters=counted)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_an_interrupted_exchange_brings_the_old_report_back(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", scores("tap", level(50)))
    out = tmp_path / "out"
    report.write_report([run], out, parameters=counted)
    rename = pathlib.Path.rename

    def fail(path, target):
        if path.suffix == ".tmp":
            raise OSError(28, "No space left on device", str(path))
        return rename(path, target)

    monkeypatch.setattr(pathlib.Path, "rename", fail)
    with pytest.raises(OSError, match="No space left"):
        report.write_report([run], out, parameters=counted)
    assert (out / "report.md").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


# --- the command ---------------------------------------------------------------------------------------------------


def test_folders_and_flags_may_stand_in_any_order():
    for argv in (["a", "b", "--out=o"], ["--out=o", "a", "b"], ["a", "--out", "o", "b"]):
        assert parse(COMMANDS["report"], argv) == {"out": "o", "across": "", "folders": ["a", "b"]}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--out=o"], "folders: name at least one DIR; see tap-jax report --help"),
        (["a"], "--out=DIR is missing"),
        (["a", "--uot=o"], "--out=DIR is missing"),
        (["a", "--out=o", "--workdir=w"], "unknown argument '--workdir'; .*report takes --out"),
        (["{tmp}/none", "--out={tmp}/o"], "report: no folder .*none; name the folders of finished runs"),
        (["{tmp}", "--out={tmp}/o"], "no finished run in"),
        (["{tmp}/run", "--out={tmp}/run"], "out: .*run holds config.json"),
    ],
)
def test_a_wrong_command_is_one_line_and_writes_nothing(argv, message, tmp_path, capsys):
    if "run" in "".join(argv):
        write_run(tmp_path / "run", scores("tap", level(50)))
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["report", *(argument.format(tmp=tmp_path) for argument in argv)]) == 2
    streams = capsys.readouterr()
    assert streams.out == "" and re.fullmatch(f"tap-jax: .*{message}.*\n", streams.err)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_counts_parameters_as_the_paper(tmp_path, capsys):
    write_run(tmp_path / "run", scores("tap", level(50)))
    assert cli.main(["report", str(tmp_path / "run"), f"--out={tmp_path}/out"]) == 0
    assert re.fullmatch(r"in .*out: report.md, report.html, \d+ tables, 0 figures\n", capsys.readouterr().out)
    row = read_csv(tmp_path / "out" / "tables" / "table_07.csv")[0]
    assert float(row["total_parameters"]) == pytest.approx(310_559_996.4)
