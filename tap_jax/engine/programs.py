"""Compiled programs that are made ready in the background, while the host does other things.

A run needs a handful of large programs, one after the other. Compiling is single-threaded in large part, so they
are compiled side by side from the start; the first call of one waits for it.
"""

import concurrent.futures
from collections.abc import Callable
from typing import Any

import jax

from tap_jax.platforms import Platform, compiler_options

_WORKERS = concurrent.futures.ThreadPoolExecutor(max_workers=2, thread_name_prefix="compile")
_WAITING: dict[object, str] = {}  # what nobody has begun to compile yet, by name
_IN_WORK: dict[object, str] = {}


def compiling() -> str:
    """What is being compiled in the background, in words; "" where nothing is."""
    names = ", ".join(list(_IN_WORK.values()))
    waiting = len(_WAITING)
    return f"compiling {names}" + (f" and {waiting} more" if waiting else "") if names else ""


class Program:
    """A function under `jax.jit` whose executables can be asked for ahead of their first call.

    Args:
      name: what a user reads while it is compiled.
      function: pure.
      platform: of the devices; default: of this process.
      jit: further arguments of `jax.jit`.

    Attributes:
      traces: how often the function has been traced; 1 as long as one program serves all calls.
    """

    def __init__(self, name: str, function: Callable, *, platform: Platform | None = None, **jit: Any):
        self.name, self.traces = name, 0

        def counted(*args):
            self.traces += 1
            return function(*args)

        self._jitted = jax.jit(counted, compiler_options=compiler_options(platform), **jit)
        self._ready: dict[Any, concurrent.futures.Future] = {}

    def prepare(self, *args: Any) -> None:
        """Starts compiling for arguments like these (arrays, or shapes with shardings); returns at once."""
        key = _signature(args)
        if key not in self._ready:
            token = object()
            _WAITING[token] = self.name
            self._ready[key] = _WORKERS.submit(_compiled, token, self._jitted, args)

    def lower(self, *args: Any) -> jax.stages.Lowered:
        """For arguments like these; nothing is compiled yet."""
        return self._jitted.lower(*args)

    def __call__(self, *args: Any) -> Any:
        """The function's result; arguments must lie where `prepare` was told they would."""
        ready = self._ready.get(_signature(args))
        return self._jitted(*args) if ready is None else ready.result()(*args)


def _compiled(token: object, jitted: Any, args: tuple) -> jax.stages.Compiled:
    _IN_WORK[token] = _WAITING.pop(token)
    try:
        return jitted.lower(*args).compile()
    finally:
        del _IN_WORK[token]


def _signature(args: Any) -> Any:
    leaves, structure = jax.tree.flatten(args)
    return structure, tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)


def abstract(tree: Any, sharding: Any) -> Any:
    """Shapes of a tree of arrays, placed by `sharding`."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)
