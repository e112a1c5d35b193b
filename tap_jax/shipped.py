"""What comes with the package and has a name: checkpoints of small models, for `model.weights` and `data.tokenizer`."""

import pathlib

CHECKPOINTS = pathlib.Path(__file__).parent / "checkpoints"


def checkpoints() -> list[str]:
    """Names of the checkpoints that come with the package."""
    return sorted(file.parent.name for file in CHECKPOINTS.glob("*/config.json"))


def located(source: str) -> str:
    """The folder of a checkpoint that comes with the package; what is no name of one (folder, hub id) stays as it is.

    Example:
      >>> import pathlib
      >>> pathlib.Path(located("demo_flava")).parts[-3:], located("./demo_flava")
      (('tap_jax', 'checkpoints', 'demo_flava'), './demo_flava')
    """
    return str(CHECKPOINTS / source) if source in checkpoints() else source
