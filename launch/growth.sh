#!/usr/bin/env bash
# Does a federation's size cost anything? Rounds of a fixed cohort among 30, 300 and 3,000 clients of the demo's size,
# rounds of larger cohorts, memory. About ten minutes on two idle cores; prints three tables.
#   bash launch/growth.sh [--rounds 10] [--clients 30 300 3000] [--cohorts 10 20 40]
set -euo pipefail
cd "$(dirname "$0")/.."
exec python launch/growth.py "$@"
