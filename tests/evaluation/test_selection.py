"""Which runs stand in one table, and which score is used where several runs have it."""

import json

import pytest

from tap_jax.errors import UserError
from tap_jax.evaluation.finished import read_runs
from tap_jax.evaluation.selection import comparisons
from tests.evaluation.fake_runs import VILT, level, scores, write_run


def read(*folders):
    return comparisons(read_runs(folders)[0])


def value(comparison, variant, backbone="routed"):
    return comparison.summaries((backbone, variant))["ag_news", "accuracy"]["mean"]


def test_seed_method_and_backbone_do_not_part_runs_but_anything_else_does(tmp_path):
    write_run(tmp_path / "a", scores("tap", level(1)))
    write_run(tmp_path / "b", scores("feddat", level(2)), {"method": "feddat", "seed": 42, "feddat.bottleneck": 8})
    write_run(tmp_path / "c", scores("fedavg", level(3)), {"method": "fedavg", "model.backbone": "standard"})
    write_run(tmp_path / "d", scores("tap", level(4)), {"engine.remat": "layer", "seed": 43})  # neutral
    (one,) = read(tmp_path)
    assert one.differing == ()
    write_run(tmp_path / "e", scores("tap", level(5)), {"local_steps": 7, "rounds": 9})
    write_run(tmp_path / "f", scores("tap", level(6), "vilt"), VILT)
    first, second, vilt = read(tmp_path)
    assert [run.id for run in first.runs] == ["r1", "r2", "r3", "r4"] and [run.id for run in second.runs] == ["r5"]
    assert first.differing == ("local_steps=20", "rounds=20") and second.differing == ("local_steps=7", "rounds=9")
    assert (vilt.model, vilt.differing) == ("vilt", ())
    assert value(second, "tap") == 5 and value(first, "tap") == 2.5


def test_runs_may_differ_in_fields_that_were_chosen_for_each_method(tmp_path):
    write_run(tmp_path / "a", scores("tap", level(1)), {"optimizer.learning_rate": 0.5})
    write_run(tmp_path / "b", scores("feddat", level(2)), {"method": "feddat", "optimizer.learning_rate": 0.25})
    runs = read_runs([tmp_path])[0]
    assert len(comparisons(runs)) == 2
    for across in (["optimizer.learning_rate"], ["optimizer"]):
        (one,) = comparisons(runs, across)
        assert (value(one, "tap"), value(one, "feddat"), one.differing) == (1, 2, ())
    with pytest.raises(UserError, match="across: no field 'optimizer.rate' in the runs"):
        comparisons(runs, ["optimizer.rate"])


def test_the_tap_run_is_preferred_and_what_is_left_out_is_said(tmp_path):
    fedavg = write_run(tmp_path / "a", scores("fedavg", level(1)), {"method": "fedavg"})
    tap = write_run(tmp_path / "b", [*scores("tap", level(2)), *scores("fedavg", level(3))])
    other = write_run(tmp_path / "c", scores("fedavg", level(5)), {"method": "fedavg", "seed": 42})
    (comparison,) = read(fedavg, tap, other)
    assert value(comparison, "fedavg") == 4  # seeds 41 and 42
    assert comparison.notes == ("Of r1 these are left out, since r2 has them with the same seed: fedavg.",)


def test_other_margins_and_settings_are_never_averaged_with_the_usual(tmp_path):
    write_run(tmp_path / "a", scores("tap", level(1)), {"seed": 41})
    write_run(tmp_path / "b", [*scores("tap", level(9)), *scores("fedavg", level(3))], {"seed": 42, "margins": 0.05})
    write_run(tmp_path / "c", scores("tap", level(2)), {"seed": 43})
    write_run(tmp_path / "d", scores("tap", level(8)), {"seed": 44, "replacement.scope": "exclusive"})
    (comparison,) = read(tmp_path)
    assert value(comparison, "tap") == 1.5
    assert value(comparison, "tap@0.05") == 9
    assert value(comparison, "tap (replacement.scope=exclusive)") == 8
    assert value(comparison, "fedavg") == 3  # has no margins


def test_margins_of_a_list_after_the_first_are_variants(tmp_path):
    rows = [*scores("tap", level(1)), *scores("tap@0.01-0.04", level(2))]
    events = [{"round": 0, "client": 0, "task": "ag_news", "variant": name} for name in ("tap", "tap@0.01-0.04")]
    write_run(tmp_path / "a", rows, replacements=events, extra={"margins": [0.02, [0.01, 0.04]]})
    write_run(tmp_path / "b", scores("tap", level(3)), {"seed": 42, "margins": 0.02})
    (comparison,) = read(tmp_path)
    assert value(comparison, "tap") == 2 and value(comparison, "tap@0.01-0.04") == 2
    ((run, found),) = comparison.events("tap@0.01-0.04")
    assert (run.id, len(found)) == ("r1", 1)


def test_runs_of_earlier_versions_are_read(tmp_path):
    folder = write_run(tmp_path / "run", scores("tap", level(1)))
    stored = json.loads((folder / "results.json").read_text())
    del stored["versions"], stored["config"]["model"]["backbone"]
    stored["replacements"] = [{"round": 0, "client": 0, "task": "ag_news"}]
    (folder / "results.json").write_text(json.dumps(stored))
    ((run,), _) = read_runs([folder])
    assert (run.config.model.backbone, run.versions, len(run.hash)) == ("routed", {}, 64)
    assert run.replacements[0]["variant"] == "tap"


# --- folders -------------------------------------------------------------------------------------------------------


def test_folders_of_runs_are_searched_and_runs_read_once(tmp_path):
    for name in ("seed10", "seed9"):
        write_run(tmp_path / name, scores("tap", level(1)), {"seed": int(name[4:])})
    (tmp_path / "notes").mkdir()
    (tmp_path / "the_same").symlink_to("seed9")
    (tmp_path / "going").mkdir()
    (tmp_path / "going" / "config.json").write_text("{}")
    runs, notes = read_runs([tmp_path, tmp_path / "seed9"])
    assert [(run.id, run.folder.name) for run in runs] == [("r1", "seed9"), ("r2", "seed10")]
    assert notes == [f"{tmp_path / 'going'} has not finished and is left out."]


def test_what_is_wrong_with_a_folder_is_said(tmp_path):
    def fails(match, *folders):
        with pytest.raises(UserError, match=match):
            read_runs(folders)

    fails("no folder .*none", tmp_path / "none")
    fails("no finished run in", tmp_path)
    (tmp_path / "going").mkdir()
    (tmp_path / "going" / "config.json").write_text("{}")
    fails("has not finished; call train again", tmp_path / "going")
    fails("no finished run in", tmp_path)
    folder = write_run(tmp_path / "run", scores("tap", level(1)))
    good = json.loads((folder / "results.json").read_text())
    for broken, match in (
        ('{"config"', "broken .*; call train again, which makes it anew, or leave the run out"),
        ("[]", "no config"),
        (json.dumps({**good, "results": []}), "no list of scores"),
        (json.dumps({**good, "results": [{"variant": "tap"}]}), "no list of scores"),
        (json.dumps({**good, "results": [{**good["results"][0], "value": "high"}]}), "a score that is no number"),
        (json.dumps({**good, "replacements": [3]}), "replacements"),
        (json.dumps({**good, "config": {"future": 1}}), "a task or field that this tap_jax does not know .*future"),
    ):
        (folder / "results.json").write_text(broken)
        fails(match, folder)
