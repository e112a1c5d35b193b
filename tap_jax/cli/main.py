"""The command line (`tap-jax`, or `python -m tap_jax`): runs a command and says how it ended, or helps.

Exit status: 0; 2 for whatever the user can mend, with one line on stderr and nothing half-written; 75 if another
process of the run has gone (134, SIGABRT, where JAX notices first), which the same command mends; 130 if interrupted;
143 if `train` was sent SIGTERM: the state is saved after the round in progress, and the same command goes on there.
"""

import difflib
import errno
import importlib.metadata
import os
import sys
import textwrap
import traceback
import warnings
from collections.abc import Sequence

from tap_jax.cli import distributed, preemption, startup, terminal
from tap_jax.cli.arguments import parse
from tap_jax.cli.commands import COMMANDS
from tap_jax.errors import Preempted, UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command -> the exit status.

    One of several processes does not return from here if it fails: the others could not end in order without it.

    Args:
      argv: without the program's name; default: the process's own.
    """
    try:
        status = _status(argv)
    except Exception as error:
        if not distributed.joined():
            raise
        if cause := distributed.lost_contact(error):
            again = "start all again with the same command, and it goes on from the last checkpoint"
            status = _fail(f"another process of the run has gone; {again} ({cause})", os.EX_TEMPFAIL)
        else:
            traceback.print_exc()
            status = 1
    if status and distributed.joined():
        distributed.leave(status, together=status == preemption.STATUS)
    return status


def _status(argv: Sequence[str] | None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if argv is None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show W̃ or ± still gets the rest
    try:
        with warnings.catch_warnings(), terminal.plain_logging():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")
            startup.quiet(bars=terminal.interactive())
            if argv is None:
                startup.drop_late_callbacks()
            return _main(sys.argv[1:] if argv is None else list(argv))
    except UserError as error:
        return _fail(str(error), 2)
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `tap-jax describe | head`
            return 128 + 13
        if error.errno not in _MENDABLE:
            raise
        return _fail(f"{error.filename or 'files'}: {error.strerror}; free some space or choose another folder", 2)
    except KeyboardInterrupt:
        status = _fail("interrupted; the same command goes on from the last checkpoint, if the run has one", 130)
    except Preempted as error:
        status = _fail(str(error), preemption.STATUS)
    if argv is None and not distributed.joined():
        sys.stdout.flush()
        os._exit(status)  # programs still compiling in the background cannot be interrupted
    return status


_MENDABLE = (
    errno.EACCES, errno.EDQUOT, errno.ENAMETOOLONG, errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS,
)  # fmt: skip


def _fail(message: str, status: int) -> int:
    who = f"process {distributed.index()}: " if distributed.joined() and distributed.index() is not None else ""
    print(f"tap-jax: {who}{' '.join(message.split())}", file=sys.stderr, flush=True)
    return status


def _main(argv: list[str]) -> int:
    name, rest = (argv[0], argv[1:]) if argv else ("", [])
    if name in ("-h", "--help", "help") or (not argv):
        about = rest[0] if rest and not rest[0].startswith("-") else None
        if about:
            _check_command(about)
        print(usage(about), end="", file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if name == "--version":
        try:
            print(importlib.metadata.version("tap-jax"))
        except importlib.metadata.PackageNotFoundError:
            print("not installed")  # run from a checkout
        return 0
    _check_command(name)
    if any(argument in ("-h", "--help", "-help") for argument in rest):
        print(usage(name), end="")
        return 0
    COMMANDS[name].run(**parse(COMMANDS[name], rest))
    return 0


def _check_command(name: str) -> None:
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        raise UserError(f"unknown command '{name}'; {hint}there are {', '.join(COMMANDS)}, and each has --help")


_STATUS = "Exit status: 0; 2, with one line on stderr, for what you can mend; 130 if interrupted.\n"


def usage(name: str | None = None) -> str:
    """The help text of a command, or of the whole."""
    if name is None:
        width = max(map(len, COMMANDS))
        listed = "\n".join(f"  {name:{width}}  {command.about}" for name, command in COMMANDS.items())
        return (
            "usage: tap-jax COMMAND [--FLAG=VALUE ...]\n\n"
            "TAP: two-stage adaptive personalization of multi-task, multi-modal models in federated learning.\n\n"
            f"{listed}\n\ntap-jax COMMAND --help tells more; tap-jax --version.\n{_STATUS}"
            "Example: tap-jax train --config=demo --workdir=runs/demo\n"
        )
    command = COMMANDS[name]
    line, rows = [f"usage: tap-jax {name}"], []
    if command.folders:
        line.append("DIR [DIR ...]")
        rows.append(("DIR", command.folders))
    for flag in command.flags:
        shown = f"--{flag.name}={flag.value}" if flag.value else f"--{flag.name}"
        line.append(shown if flag.default is None else f"[{shown}]")
        rows.append((shown, flag.about))
        if flag.name == "config":
            line.append("[--config.KEY=VALUE ...]")
            rows.append(("--config.KEY=VALUE", "changes one field; tap_jax/config/defaults.py explains all of them"))
    width = max(len(shown) for shown, _ in rows)
    listed = "\n".join(f"  {shown:{width}}  {about}" for shown, about in rows)
    return (
        "\n".join(
            [
                textwrap.fill(" ".join(line), 100, subsequent_indent="  ", break_on_hyphens=False),
                "",
                textwrap.fill(command.about[0].upper() + command.about[1:] + ".", 100),
                "",
                listed,
                "",
            ]
        )
        + f"\n{_STATUS}{command.details}\n"
    )
