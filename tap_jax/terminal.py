"""How a run shows itself: a progress bar on a terminal, plain lines in a pipe; log lines without ornament."""

import contextlib
import logging
import shutil
import statistics
import sys
from collections.abc import Iterator

from tqdm import tqdm

PLAIN_LINES = 20  # of progress in a whole run where there is no terminal, and one for the first round


class Terminal:
    """Prints the progress and the words of a run; a context manager, so that the bar is closed on errors too.

    Args:
      rounds: T.
      bar: whether to draw a progress bar; default: where stdout and stderr are terminals.
    """

    def __init__(self, rounds: int, *, bar: bool | None = None):
        self.rounds = rounds
        self._draw = interactive() if bar is None else bar
        self._bar: tqdm | None = None
        self._every = max(1, -(-rounds // PLAIN_LINES))
        self._times: list[float] = []
        self._told = False  # that an update was dropped

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_) -> None:
        self._close()

    def say(self, text: str) -> None:
        """One line on stdout, above the bar if there is one."""
        if self._bar is None:
            print(text, flush=True)
        else:
            tqdm.write(text, file=sys.stdout)

    def progress(self, line: dict) -> None:
        """A line of metrics.jsonl, after its round."""
        done = line["round"] + 1
        if line.get("dropped") and not self._told:
            self._told = True
            found = ", ".join(f"client {entry['client']} ({entry['why']})" for entry in line["dropped"])
            self.say(f"round {done}: update dropped of {found}; metrics.jsonl has this and any later ones")
        if self._draw:
            if self._bar is None:
                # Not tqdm's own measure: in containers it may be 0 x 0, on which nothing would be drawn.
                size = shutil.get_terminal_size((100, 24))
                self._bar = tqdm(
                    total=self.rounds, initial=line["round"], unit="round", ncols=size.columns, nrows=size.lines
                )
            self._bar.set_postfix_str(losses(line), refresh=False)
            self._bar.update()
            if done == self.rounds:
                self._close()
        else:
            self._times.append(line["seconds"])
            if done % self._every == 0 or done == self.rounds or len(self._times) == 1:
                own = [entry for entry in line.get("replacements", ()) if entry.get("variant", "tap") == "tap"]
                replaced = f", {len(own)} replaced" if "replacements" in line else ""
                self.say(
                    f"round {done}/{self.rounds}: {losses(line)}{replaced}; {line['seconds']:.2g} s{self._left(done)}"
                )

    def _left(self, done: int) -> str:
        """An estimate, once there is a round that did not compile."""
        if len(self._times) < 2 or done == self.rounds:
            return ""
        return f", about {duration(statistics.median(self._times[1:][-20:]) * (self.rounds - done))} left"

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def losses(line: dict) -> str:
    """Mean losses over a round's clients and tasks, by chain: "loss federated 1.234, personal 1.120"."""
    means = []
    for chain, clients in line["losses"].items():
        values = [value for tasks in clients.values() for value in tasks.values()]
        finite = [value for value in values if value is not None]
        mean = f"{statistics.fmean(finite):.4g}" if finite else "-"
        means.append(f"{chain} {mean}" + (" (some not finite)" if len(finite) < len(values) else ""))
    return "loss " + ", ".join(means)


def duration(seconds: float) -> str:
    """0:05, 12:34, 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def interactive() -> bool:
    """Whether somebody is watching."""
    return sys.stdout.isatty() and sys.stderr.isatty()


def columns() -> int:
    """Width for tables."""
    return shutil.get_terminal_size((100, 24)).columns


@contextlib.contextmanager
def plain_logging() -> Iterator[None]:
    """Within it, warnings of this package are plain lines on stderr, each said once."""
    logger, handler = logging.getLogger("tap_jax"), _Lines()
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


class _Lines(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text not in self._said:
            self._said.add(text)
            tqdm.write(text, file=sys.stderr)
            sys.stderr.flush()
