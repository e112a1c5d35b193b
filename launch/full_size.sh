#!/usr/bin/env bash
# The paper's sizes from start to end on a CPU: a FLAVA and a ViLT checkpoint with random weights, written by
# transformers, then one round, Stage 2 and evaluation of all 30 clients on real data, in little: a batch of two, one
# step, a few test samples. Prints minutes and peak memory; what is slow or heavy at full size shows here first.
#   bash launch/full_size.sh DATA [--models flava vilt] [--out runs/full_size] [--tests N] [--keep]
#                                 [--config.KEY=VALUE ...]
# DATA is a folder of parquet files, one sub-folder per task (launch/docs/data.md). Needs two cores, 14 GB of memory,
# 25 GB of disk in --out, the extra offline-metrics, and PyTorch with transformers; no network.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python}" launch/full_size.py "$@"
