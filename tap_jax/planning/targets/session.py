"""Compiling in a process of its own, with a time limit for each program.

A compiler for a target may take very long, or end the process; the command that asked for it goes on. The process is
forked before JAX starts anything, so that it has the configuration and what was registered with it; where a program has
taken too long it is ended, and another one goes on with the next.
"""

import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from tap_jax.config import ConfigDict
from tap_jax.errors import UserError
from tap_jax.planning.targets.compile import Built, Found
from tap_jax.planning.targets.topology import Target, environment

BUILDING = 3600  # seconds that reading data and tracing may take


def compile_all(
    config: ConfigDict,
    target: Target,
    *,
    minutes: float,
    say: Callable[[str], None],
    only: Callable[[str], bool] = lambda phase: True,
    enough: Callable[[Found], bool] = lambda one: True,
    known: Sequence[Found] = (),
) -> tuple[Built, list[Found]]:
    """Compiles a run's programs for a target, one after the other.

    Args:
      minutes: for one program.
      say: is given a line as each begins.
      only: of a phase: whether to compile its programs.
      enough: of a program: whether to go on with the next.
      known: what was found earlier of some of the programs, which are not compiled again.

    Raises:
      UserError: the target or the configuration cannot be had; whatever the process raised as such.
    """
    found = {one.name: one for one in known}
    built = None
    while built is None or len(found) < len(built.names):
        with _Child("serve", config, target, tuple(found), only) as child:
            built = child.receive(BUILDING)
            if built is None:
                raise UserError(
                    "target: the compiler's process ended before it had built the run; run it with less data"
                )
            while len(found) < len(built.names):
                name = next(name for name in built.names if name not in found)
                say(f"compiling {name}")
                one, ended = child.receive(60 * minutes), False
                if one is None:
                    late, ended = child.alive, True
                    problem = f"not known after {minutes:g} minutes" if late else "the compiler ended its process"
                    one = Found(name, seconds=60 * minutes if late else 0, problem=problem)
                found[name] = one
                if not enough(one):
                    return built, list(found.values())
                if ended:
                    break  # and go on in a new process
    return built, list(found.values())


def chosen_sizes(config: ConfigDict, target: Target) -> list[Any]:
    """`device_sizes.choices` for the target's devices.

    Raises:
      UserError: as `compile_all`.
    """
    with _Child("sizes", config, target) as child:
        found = child.receive(BUILDING)
    if found is None:
        raise UserError("target: the process that looks for sizes ended; name them: engine.microbatch and the like")
    return found


class _Child:
    """A forked process in which a function of `describing` sends things; it is ended with the block."""

    def __init__(self, function: str, config: ConfigDict, target: Target, *args: Any):
        context = multiprocessing.get_context("fork")
        self._mine, theirs = context.Pipe(duplex=False)
        sys.stdout.flush()
        sys.stderr.flush()
        self._process = context.Process(target=_run, args=(theirs, function, config, target, *args), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> "_Child":
        return self

    def __exit__(self, *_) -> None:
        self._process.kill()
        self._process.join()
        self._mine.close()

    @property
    def alive(self) -> bool:
        """Whether it has not ended by itself."""
        return self._process.is_alive()

    def receive(self, seconds: float) -> Any:
        """What it sends next; None where nothing comes in so many seconds, or ever.

        Raises:
          UserError: it raised one.
        """
        try:
            if not self._mine.poll(seconds):
                return None
            found = self._mine.recv()
        except EOFError:
            self._process.join()
            return None
        if isinstance(found, UserError):
            raise found
        return found


def _run(connection: Any, function: str, config: ConfigDict, target: Target, *args: Any) -> None:
    """In the child: what compilers print goes nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    if not os.environ.get("TAP_JAX_COMPILER_OUTPUT"):
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
    try:
        os.environ.update(environment(target))
        from tap_jax.planning.targets import describing  # and with it JAX

        getattr(describing, function)(connection.send, config, target, *args)
    except UserError as error:
        connection.send(error)
    finally:
        connection.close()
