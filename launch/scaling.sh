#!/usr/bin/env bash
# What more modality-task pairs cost the server, and what TAP then gains: federations of 4, 8, 16 and 32 pairs.
# Finished federations are kept in the folder and not trained again, so the same command goes on after an interruption.
# 14 minutes of CPU time on two cores; writes scaling.csv and scaling.png, prints tables.
#   bash launch/scaling.sh [--pairs 4 8 16 32] [--seeds 41 42] [--rounds 12] [--out runs/scaling] [--smoke]
set -euo pipefail
cd "$(dirname "$0")/.."
exec python launch/scaling.py "$@"
