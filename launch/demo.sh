#!/usr/bin/env bash
# Installs the project into the current environment and runs the demo (the first command of README.md).
set -euo pipefail
cd "$(dirname "$0")/.."
pip install -c constraints.txt -e .
tap-jax train --config=demo --workdir="${1:-runs/demo}"
