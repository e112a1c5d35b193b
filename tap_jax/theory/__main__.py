"""Checks the convergence bound on block quadratics: `python -m tap_jax.theory --out=DIR`, 10 to 20 seconds on a CPU.

Writes theory_bound.csv, .md and .png. Exit status 1 if a bound fails where none of its assumptions is broken.
"""

import argparse
import pathlib
import sys

from tap_jax.theory import check, report


def main() -> int:
    """Runs the experiment as the command line says -> exit status."""
    parser = argparse.ArgumentParser(prog="python -m tap_jax.theory", description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/theory"), help="folder for the files")
    parser.add_argument("--seed", type=int, default=0, help="of the federations, their noise and cohorts")
    chosen = parser.parse_args()
    verdicts = [verdict for setting in check.grid() for verdict in check.measure(setting, seed=chosen.seed)]
    grown = check.growth()
    files = report.write(chosen.out, verdicts, grown)
    print(report.summary(verdicts))
    print("\n".join(f"Wrote {file}" for file in files))
    return int(any(verdict.unexplained for verdict in [*verdicts, *grown]))


if __name__ == "__main__":
    sys.exit(main())
