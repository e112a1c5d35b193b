#!/usr/bin/env bash
# What every program of the paper's two settings needs on devices that are not here: memory, collectives, time at the
# peak, as the targets' own compilers say. Needs tap-jax[target-tpu] and tap-jax[target-gpu] for the targets asked for,
# and 12 GB of free memory. What has been compiled is kept in the folder and not compiled again.
#   bash launch/targets.sh DATA TOKENIZER [--targets h100 a100-40 v5e:2x4 v4:2x2x1 v5p:2x2x1]
#     [--configs configs/flava.py configs/vilt.py] [--minutes 30] [--out runs/targets] [--fit] [--write]
# DATA is a folder of parquet files, one sub-folder per task, or "synthetic"; TOKENIZER BERT's word pieces, a folder or
# a hub id, or "train". OUT gets results.jsonl and targets.md; with --write the table goes into launch/benchmarks.md.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
exec "${PYTHON:-python3}" launch/targets.py "$@"
