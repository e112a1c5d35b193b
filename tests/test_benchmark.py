"""`tap-jax bench`: what the line says, that both sides of a comparison do the same, and peaks of devices."""

import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from tap_jax.assembly import cut
from tap_jax.cli.arguments import parse
from tap_jax.cli.commands import COMMANDS
from tap_jax.engine.engine import Engine
from tap_jax.errors import UserError
from tap_jax.planning import benchmark
from tap_jax.platforms import peak_tflops

THREE = ({"ag_news": 1.0, "fashion_mnist": 0.5}, {"mmlu": 1.0}, {"fashion_mnist": 0.5})


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    """What PyTorch is asked for; it stays at one thread, since several would spin beside other tests."""
    asked = []
    torch.set_num_threads(1)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    return asked


def test_pytorch_trains_on_the_same_to_the_same_losses(tiny, threads, monkeypatch):
    config = tiny(THREE, {"cohort_size": 3, "data.train_size": 30})  # the last minibatch of a pass is not full
    said = []
    line = benchmark.bench(config, steps=4, against="torch", say=said.append)
    assert json.loads(json.dumps(line, allow_nan=False)) == line
    assert (line["steps"], line["clients"], line["devices"]) == (4, 3, 1)
    assert line["tasks"] == ["fashion_mnist", "ag_news", "mmlu"]
    assert set(line["text_tokens"]) == {"ag_news", "mmlu"} and set(line["answer_tokens"]) == {"mmlu"}
    assert len(line["seconds"]) == len(line["torch_seconds"]) == benchmark.REPEATS >= 5
    median = np.median(line["seconds"])
    assert line["client_steps_per_s"] == pytest.approx(12 / median, rel=1e-3)
    assert line["samples_per_s"] < 8 * line["client_steps_per_s"]
    assert line["ratio"] == pytest.approx(np.median(line["torch_seconds"]) / median, rel=1e-3)
    assert line["tflops"] == pytest.approx(12 * line["flops_per_client_step"] / median / 1e12, rel=1e-3)
    assert line["mfu"] is None, "a CPU has no peak"
    assert line["round_s"] is None and line["stage2_s_per_client"] is None
    assert all(text.startswith("bench: ") for text in said)
    assert line["loss_difference"] < 1e-5 and line["torch_error"] is None
    assert threads == [len(os.sched_getaffinity(0))], "all cores"

    # The comparison would notice a PyTorch that does not learn.
    monkeypatch.setattr(benchmark, "REPEATS", 1)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    # One task is enough for that, at a rate at which four steps show.
    one = tiny(({"ag_news": 1.0},), {"cohort_size": 1, "optimizer.post_learning_rate": 0.01})
    assert benchmark.bench(one, steps=4, against="torch-fused")["loss_difference"] > 1e-3


def test_pytorch_in_bfloat16_under_autocast(tiny):
    config = tiny(({"vqa": 1.0}, {"cifar100": 1.0}), {"compute_dtype": "bfloat16", "engine.remat": "layer"})
    line = benchmark.bench(config, steps=1, against="torch-fused")
    assert line["dtype"] == "bfloat16"
    assert 0 < line["loss_difference"] < 0.02


def test_pytorch_that_cannot_does_not_cost_the_line(tiny, monkeypatch):
    def full(*args, **options):
        raise torch.OutOfMemoryError("tried to allocate\n2 GiB")

    monkeypatch.setattr(torch.optim, "AdamW", full)
    line = benchmark.bench(tiny(({"fashion_mnist": 1.0},), {"cohort_size": 1}), steps=1, against="torch")
    assert line["torch_error"] == "OutOfMemoryError: tried to allocate 2 GiB"
    assert line["client_steps_per_s"] > 0 and line["ratio"] is line["torch_client_steps_per_s"] is None


def test_rounds_and_stage_2(tiny, monkeypatch):
    given, train = [], Engine.train
    monkeypatch.setattr(
        Engine, "train", lambda self, params, *rest: given.append(rest[0]) or train(self, params, *rest)
    )
    rows = ({"ag_news": 0.5}, {"fashion_mnist": 0.5}, {"ag_news": 0.5, "fashion_mnist": 0.5})
    config = tiny(rows, {"federation.groups": 2, "rounds": 50})
    line = benchmark.bench(config, steps=2, rounds=3, against="torch")
    assert line["steps"] == 2 < config.post_steps
    assert line["loss_difference"] < 1e-5
    assert line["client_steps_per_s"] == pytest.approx(4 / np.median(line["seconds"]), rel=1e-3)
    assert len(line["round_seconds"]) == 3 and line["round_s"] == np.median(line["round_seconds"])
    assert line["schedule_s"] == pytest.approx(50 * np.mean(line["round_seconds"]), rel=1e-3)
    assert line["stage2_clients"] == [0, 1, 2], "one of each pattern"
    assert given and all(moments is None for moments in given), "the program of rounds is timed"
    assert line["stage2_s"] == pytest.approx(6 * line["stage2_s_per_client"], rel=1e-3)


def test_methods_whose_steps_do_more(tiny):
    assert cut(tiny(THREE)).gradients == 1
    assert cut(tiny(THREE, {"method": "per_fedavg"})).gradients == 2
    assert cut(tiny(THREE, {"method": "per_fedavg", "per_fedavg.hessian": "exact"})).gradients is None
    config = tiny(({"ag_news": 1.0},), {"method": "per_fedavg", "cohort_size": 1})
    line = benchmark.bench(config, steps=1, rounds=0)
    plain = benchmark.bench(tiny(({"ag_news": 1.0},), {"method": "fedavg", "cohort_size": 1}), steps=1)
    assert line["flops_per_client_step"] == 2 * plain["flops_per_client_step"]
    with pytest.raises(UserError, match="against: PyTorch has no steps of 'per_fedavg' here; use --config.method=tap"):
        benchmark.bench(config, steps=1, against="torch")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": -1}, "steps: -1; use at least 1"),
        ({"rounds": -1}, "rounds: -1; use at least 1"),
        ({"rounds": 1, "steps": 4}, "steps: 4; with rounds use at most post_steps = 3"),
        ({"against": "flax"}, "against: unknown 'flax'; use one of torch, torch-fused"),
    ],
)
def test_arguments_that_do_not_go_together(tiny, arguments, message):
    with pytest.raises(UserError, match=message):
        benchmark.bench(tiny(THREE), **arguments)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("cpu", None),
    ],
)
def test_peaks(kind, peak):
    assert peak_tflops(kind, "bfloat16") == peak
    assert peak_tflops(kind, "float32") is None


GPU_BENCH = pathlib.Path(__file__).parents[1] / "launch" / "gpu_bench.sh"
# Stands for python3: benchmarks of rows of 32 fail, and so do all of ViLT's; the demo is done at once.
STAND_IN = """#!/usr/bin/env bash
case "$*" in
    -m*bench*vilt* | -m*bench*microbatch=32*) echo "out of memory" >&2; exit 1 ;;
    -m*bench*) echo '{line}' ;;
    -m*train*) folder=${{!#}}; folder=${{folder#--workdir=}}; mkdir -p "$folder"; echo done >"$folder/report.md" ;;
    *) exec {python} "$@" ;;
esac
"""


def gpu_bench(*arguments, **environment):
    command = ["bash", str(GPU_BENCH), *map(str, arguments)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=60)


def test_the_gpu_script_says_what_it_would_start(tmp_path):
    done = gpu_bench("--dry-run", tmp_path / "out", PYTHON=sys.executable, TOKENIZER="train")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "out").exists()
    lines = [re.fullmatch(r"\[at most (\d+) s\] (.*)", line).groups() for line in done.stdout.splitlines()]
    parts = {next(word for word in line.split() if word.startswith("--config=")): int(limit) for limit, line in lines}
    assert len(parts) == 3 and sum(parts.values()) <= 600, "ten minutes in all"
    for _, line in lines:
        program, command, *rest = line.removeprefix(f"{sys.executable} -m ").split()
        assert program == "tap_jax"
        config = parse(COMMANDS[command], rest)["config"]
        assert command == "train" or (config.compute_dtype, config.batch_size, config.rounds) == ("bfloat16", 128, 200)


def test_the_gpu_script_goes_on_where_a_part_fails(tmp_path, tiny):
    measured = benchmark.bench(tiny(({"fashion_mnist": 1.0, "ag_news": 1.0},), {"cohort_size": 1}), steps=1)
    stand_in = tmp_path / "python"
    stand_in.write_text(STAND_IN.format(line=json.dumps(measured), python=sys.executable))
    stand_in.chmod(0o755)
    done = gpu_bench(tmp_path / "out", PYTHON=str(stand_in))
    assert done.returncode == 1, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [line["part"] for line in lines] == ["flava", "demo"]
    assert lines[0] == {"part": "flava", **measured}
    table = (tmp_path / "out" / "table.md").read_text()
    assert table in done.stdout
    assert f"1 x cpu, float32, jax {measured['jax']}" in table
    assert f"| flava | {measured['client_steps_per_s']:.4g} |" in table and "| — |" in table
    assert "Failed or too slow, see gpu_bench.log: vilt." in table
    log = (tmp_path / "out" / "gpu_bench.log").read_text()
    assert log.count("out of memory") == 3 and log.count("== ") == 5
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "results.jsonl", "table.md", "gpu_bench.log", "device.txt", "demo.md",
    }  # fmt: skip
