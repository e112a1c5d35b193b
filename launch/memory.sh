#!/usr/bin/env bash
# Peak memory of the paper's 30 clients at base size, two in training, against what `tap-jax describe` predicts: on the
# CPU, with random weights and drawn data. Needs Linux, 14 GB of free memory for FLAVA and 20 GB for ViLT.
#   bash launch/memory.sh [--config configs/flava.py configs/vilt.py]
set -euo pipefail
cd "$(dirname "$0")/.."
exec python launch/memory.py "$@"
