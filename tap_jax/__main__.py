"""`python -m tap_jax` is `tap-jax`."""

import sys

from tap_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
