"""The scripts of launch/tables: which runs each asks for, with a tap-jax that only notes its arguments."""

import json
import os
import pathlib
import re
import subprocess

import pytest

from tap_jax.config import load_config, to_json, variants_of

ROOT = pathlib.Path(__file__).parents[1]
TABLES = ROOT / "launch" / "tables"
NOTING = """#!/usr/bin/env bash
printf '%s\\n' "$*" >> "$CALLS"
if [[ -n ${FAIL:-} && $* == train*$FAIL* ]]; then exit 1; fi
for argument; do
    workdir=${argument#--workdir=}
    [[ $workdir == "$argument" ]] || { mkdir -p "$workdir"; echo '{}' > "$workdir/results.json"; }
done
exit 0
"""


@pytest.fixture
def launch(tmp_path):
    """launch(script, *arguments, **environment) -> (calls of tap-jax, the process)."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "tap-jax").write_text(NOTING)
    (tmp_path / "bin" / "tap-jax").chmod(0o755)

    def start(script, *arguments, **environment):
        (tmp_path / "calls").unlink(missing_ok=True)
        environment = {"RUNS": str(tmp_path / "runs"), "OUT": str(tmp_path / "report"), "DATA": "slices"} | environment
        environment |= {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}
        command = ["bash", str(TABLES / script), *arguments]
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=60)
        calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
        return calls, done

    return start


def configs(calls):
    """The configuration of every training, by the name of its folder."""
    trained = (re.fullmatch(r"train --config=(\S+) --workdir=\S*/([^/ ]+)(?: .*)?", call) for call in calls)
    return {found[2]: load_config(ROOT / found[1]) for found in trained if found}


@pytest.mark.parametrize("size", ["full", "mini", "demo"])
def test_every_script_asks_for_runs_that_can_be_made(size, launch):
    calls, done = launch("all.sh", size, SEEDS="41")
    assert done.returncode == 0, done.stderr
    found = configs(calls)
    # Eight runs for each model's tables and a centralised one; in demo, whose learning rates are chosen, Local's, too.
    count = 20 if size == "demo" else 18
    assert len(found) == len(calls) - 1 == count
    for name, config in found.items():
        model, method = name.split("-")[:2]
        assert (config.model.name, config.method, config.seed) == (model, method, 41)
        assert (config.model.backbone == "standard") == ("standard" in name)
    assert variants_of(found["flava-tap-41"])[-3:] == ("tap@0.01-0.04", "tap@0.02-0.05", "tap@0.05-0.1")
    # Each run is asked for with the margins of its own model first (Table 22).
    for model in ("flava", "vilt"):
        own = load_config(ROOT / "configs" / f"{model}.py").margins
        assert dict(found[f"{model}-tap-41"].margins[0]) == own.to_dict()
    assert calls[-1].startswith("report ") and calls[-1].count("/runs/") == count
    assert calls[-1].endswith("--across=optimizer")


def test_local_has_the_rate_that_was_chosen_for_it_and_is_trained_once(launch):
    found = configs(launch("table_02.sh", "demo")[0])
    assert found["flava-local-51"].optimizer.learning_rate == 8e-3
    assert {config.optimizer.learning_rate for config in found.values()} == {4e-3, 8e-3}
    assert [name for name, config in found.items() if "local" in variants_of(config)] == ["flava-local-51"]
    everywhere = configs(launch("table_02.sh", "mini")[0])
    assert "local" in variants_of(everywhere["flava-tap-41"]) and "flava-local-41" not in everywhere


@pytest.mark.parametrize("number", range(1, 18))
def test_a_table_asks_for_its_own_runs_only(number, launch):
    calls, done = launch(f"table_{number:02d}.sh", "demo", SEEDS="41 42")
    assert done.returncode == 0, done.stderr
    found = configs(calls)
    assert len(found) == len(calls) - 1
    image_table_of = {1: "vilt", 2: "flava", 4: "vilt", 5: "flava", 8: "vilt", 9: "flava", 11: "vilt", 12: "flava"}
    models = {image_table_of[number]} if number in image_table_of else {14: {"vilt"}, 15: {"flava"}}.get(number)
    assert {name.split("-")[0] for name in found} == (models or {"flava", "vilt"})
    assert any("standard" in name for name in found) == (number in (14, 15, 16))
    assert {config.seed for config in found.values()} == {41, 42}
    assert all(f"{model}-tap-41" in found for model in {name.split("-")[0] for name in found})


def test_a_finished_run_is_not_made_again(launch):
    first, _ = launch("table_04.sh", "demo")
    again, _ = launch("table_09.sh", "demo")
    assert list(configs(first)) == ["vilt-tap-51"] and set(configs(again)) == {"flava-tap-51", "flava-disentafl-51"}
    more, _ = launch("table_08.sh", "demo")
    assert list(configs(more)) == ["vilt-disentafl-51"]


def test_the_demo_has_every_table_and_the_checks(launch):
    calls, done = launch("all_demo.sh", JOBS="1")
    assert done.returncode == 0, done.stderr
    checks = {name for name in configs(calls) if name.startswith("check-")}
    assert checks == {f"check-{path.stem}-51" for path in (ROOT / "configs" / "checks").glob("*.py")}
    assert [call.split()[0] for call in calls].count("report") == 2


def test_a_run_that_fails_does_not_stop_the_others(launch):
    calls, done = launch("table_02.sh", "demo", FAIL="disentafl", JOBS="1")
    assert done.returncode == 1 and "flava-disentafl-51 failed" in done.stderr
    assert len(configs(calls)) == 5
    assert calls[-1].startswith("report ") and "flava-feddat-51" in calls[-1] and "disentafl" not in calls[-1]


def test_a_wrong_size_is_named(launch):
    calls, done = launch("table_02.sh", "tiny")
    assert done.returncode == 2 and not calls
    assert "unknown size 'tiny'; use full, mini or demo" in done.stderr


def test_findings_change_one_thing_at_a_time(launch, tmp_path):
    stub = tmp_path / "bin" / "python"
    stub.write_text("#!/usr/bin/env bash\nexit 0\n")
    stub.chmod(0o755)
    calls, done = launch("findings.sh", SEEDS="51 52", JOBS="1")
    assert done.returncode == 0, done.stderr
    found = configs(calls)
    names = {name.rpartition("-")[0] for name in found}
    assert len(found) == 2 * len(names) == len(calls) == 22
    demo = json.loads(to_json(load_config(ROOT / "configs" / "demo.py")))
    for name, config in found.items():
        fields = json.loads(to_json(config))
        changed = {key for key in fields if fields[key] != demo[key]} - {"seed", "variants", "margins"}
        assert len(changed) <= 2 and (changed or "margin" in name or name.startswith("flava-tap")), name
        assert {"tap", "tap-stage2", "tap-no-kd", "fedavg+post", "fedavg+2p"} <= set(variants_of(config))
        assert config.seed == int(name[-2:])
