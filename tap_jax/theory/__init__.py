"""The convergence bound of the server model (Sec. 4) and the experiment that checks it, `python -m tap_jax.theory`."""

from tap_jax.theory.bound import bound, largest_rate, mended_bound

__all__ = ["bound", "largest_rate", "mended_bound"]
