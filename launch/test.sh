#!/usr/bin/env bash
# Installs the project with its test extra into the current environment and runs the tests (README.md, second command).
set -euo pipefail
cd "$(dirname "$0")/.."
pip install -c constraints.txt -e '.[test]'
pytest "$@"
