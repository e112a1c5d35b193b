"""How a run shows itself: a progress bar on a terminal, plain lines in a pipe; log lines without ornament."""

import contextlib
import logging
import shutil
import statistics
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from tqdm import tqdm

# Of the rounds where there is no terminal, beside the first two: the first compiles, and after the second it is known
# how long the others take.
PLAIN_LINES = 20
LAST_LINES = 10  # after the last round
SILENCE = 8.0  # seconds without a line after which a run says what it is at, before the second round and after the last


class Terminal:
    """Prints the progress and the words of a run; a context manager, so that the bar is closed on errors too.

    Args:
      rounds: T.
      bar: whether to draw a progress bar; default: where stdout and stderr are terminals.
      clock: seconds.
      compiling: asked what is compiled in the background, as long as that may be what a user waits for; "" for nothing.
    """

    def __init__(
        self,
        rounds: int,
        *,
        bar: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
        compiling: Callable[[], str] = lambda: "",
    ):
        self.rounds, self._clock, self._started, self._compiling = rounds, clock, clock(), compiling
        self._draw = interactive() if bar is None else bar
        self._bar: tqdm | None = None
        self._room, self._closed = 0, threading.Event()  # characters behind the bar; that it is closed
        self._told = False  # that an update was dropped
        self._first: tuple[int, float] | None = None  # rounds done after the first of this process, and the time then
        self._scored = self._total = self._warm = 0  # how often, of how often; after how often nothing compiles
        self._since = 0.0  # the time then
        self._doing: tuple[str, float] | None = None  # what is going on, and since when
        self._said = self._clock()  # when a line was printed last
        self._talks = threading.RLock()  # a signal may want to say something while a line is printed
        self._talker: threading.Thread | None = None
        self._ended = False

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
        self._doing, self._ended = None, True

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return self._clock() - self._started

    def say(self, text: str) -> None:
        """Lines on stdout, above the bar if there is one; on a screen they are broken between words."""
        if self._draw:
            text = "\n".join(_broken(line, columns()) for line in text.split("\n"))
        with self._talks:
            self._print(text)

    def _print(self, text: str) -> None:
        self._said = self._clock()
        if self._bar is None:
            print(text, flush=True)
        else:
            tqdm.write(text, file=sys.stdout)

    def doing(self, text: str) -> None:
        """What begins now, "" for nothing slow: it stands behind the bar, or is said where all is silent for long."""
        self._doing = (text, self._clock()) if text else None
        if self._draw:
            if self._bar is None or not self._bar.total:
                self._close()
                if text:
                    self._open(text)
            elif text:
                self._bar.set_postfix_str(text[: max(0, self._room)], refresh=False)
        elif text and self._talker is None:
            self._talker = threading.Thread(target=self._talk, daemon=True)
            self._talker.start()

    def _talk(self) -> None:
        while not self._ended:
            time.sleep(0.5)
            with self._talks:
                self.after_silence()

    def after_silence(self) -> None:
        """Says what is going on, if nothing has been said for too long."""
        doing, now = self._doing, self._clock()
        if doing and now - self._said >= SILENCE:
            text = ", ".join(filter(None, (doing[0], self._compiling())))
            self._print(f"  {text}, for {short(now - doing[1])}")

    def reading(self, what: str, done: int, total: int) -> None:
        """So many of the rows of a split ("task/split") are converted."""
        if self._draw:
            if self._bar is None or self._bar.desc != f"reading {what}":
                self._open(f"reading {what}", 0, total, stays=False)
            if self._bar is not None:
                self._bar.update(done - self._bar.n)
        if done == total:
            self._close()
            self.doing("reading data, building the model")
        else:
            since = self._doing[1] if self._doing and self._doing[0].startswith(f"reading {what}:") else self._clock()
            self._doing = f"reading {what}: {done:,} of {total:,} rows", since

    def begin(self, done: int) -> None:
        """Before the first round of this process; so many are done."""
        if done < self.rounds:
            self._doing = f"round {done + 1}/{self.rounds}, the first of this process", self._clock()
            self._open("rounds", done, self.rounds)
            self.doing(self._doing[0])

    def progress(self, line: dict) -> None:
        """A line of metrics.jsonl, after its round."""
        done, now = line["round"] + 1, self._clock()
        self.doing("")
        if line.get("dropped") and not self._told:
            self._told = True
            found = ", ".join(f"client {entry['client']} ({entry['why']})" for entry in line["dropped"])
            self.say(f"round {done}: update dropped of {found}; metrics.jsonl has this and any later ones")
        self._first = self._first or (done, now)
        timed, left = done - self._first[0], ""
        if timed and done < self.rounds:
            left = f"about {duration((now - self._first[1]) / timed * (self.rounds - done))} left"
        if self._draw:
            self._show("rounds", done, self.rounds, [left, *means(line, digits=3)])
        elif timed < 2 or _shown(done, self.rounds, PLAIN_LINES):
            own = [entry for entry in line.get("replacements", ()) if entry.get("variant", "tap") == "tap"]
            replaced = f", {len(own)} replaced" if "replacements" in line else ""
            took = short(line["seconds"]) + ("" if timed else " with compiling")
            self.say(f"round {done}/{self.rounds}: {losses(line)}{replaced}; {', '.join(filter(None, (took, left)))}")

    def last(self, times: Mapping[str, int]) -> None:
        """Before models are scored: variant -> how often this will be done."""
        self._scored, self._total = 0, sum(times.values())
        # The first batch of clients, in which programs may still be compiled.
        self._warm = sum(count > 1 for count in times.values())
        self._open("scored", 0, self._total)

    def scored(self, variant: str) -> None:
        """A variant's models of some clients are trained and scored."""
        self._scored += 1
        now, timed, left = self._clock(), self._scored - self._warm, ""
        if not timed:
            self._since = now
        elif timed >= self._warm > 0 and self._scored < self._total:  # clients differ: not on less than another batch
            left = f"about {duration((now - self._since) / timed * (self._total - self._scored))} left"
        if self._draw:
            self._show("scored", self._scored, self._total, [left, variant])
        elif _shown(self._scored, self._total, LAST_LINES):
            self.say(f"scored {self._scored}/{self._total}: {'; '.join(filter(None, (variant, left)))}")

    def _open(self, what: str, done: int = 0, total: int = 0, *, stays: bool = True) -> None:
        """A bar; without a total only a clock, which goes as does a bar that does not stay."""
        if self._draw:
            self._close()
            # Not tqdm's own measure: in containers it may be 0 x 0, on which nothing would be drawn.
            size = shutil.get_terminal_size((100, 24))
            bar = 25 if size.columns >= 120 else 6
            self._bar = tqdm(
                desc=what,
                total=total,
                initial=done,
                bar_format=f"{{desc}} {{n_fmt}}/{{total_fmt}} |{{bar:{bar}}}| {{elapsed}}{{postfix}}"
                if total
                else "{desc} {elapsed}",
                postfix=self._doing[0] if self._doing and stays and total else "",
                leave=stays and total > 0,
                ncols=size.columns,
                nrows=size.lines,
            )
            self._room = size.columns - len(f"{what} {total}/{total} || 0:00:00") - bar - 1
            self._closed = threading.Event()
            threading.Thread(target=self._tick, args=(self._bar, self._closed), daemon=True).start()

    def _tick(self, bar: tqdm, closed: threading.Event) -> None:
        """Keeps the clock beside the bar going: a round may take minutes, and its programs longer."""
        while not closed.wait(1):
            with bar.get_lock():
                if not closed.is_set():
                    if bar.n == bar.initial and bar.total:
                        text = self._compiling() or (self._doing[0] if self._doing else "")
                        bar.set_postfix_str(text[: max(0, self._room)], refresh=False)
                    bar.refresh()

    def _show(self, what: str, done: int, total: int, texts: Sequence[str]) -> None:
        """Redraws the bar with as many of the texts behind it as fit, so that no number is cut."""
        if self._bar is None:
            self._open(what, done, total)
        shown = ""
        for text in filter(None, texts):
            if len(shown) + len(text) + 2 > self._room:
                break
            shown += f", {text}"
        if self._bar is not None:
            self._bar.set_postfix_str(shown[2:], refresh=False)
            self._bar.update(done - self._bar.n)
        if done == total:
            self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._closed.set()
            self._bar.close()
            self._bar = None


def _shown(done: int, total: int, lines: int) -> bool:
    return done == total or done % max(1, -(-total // lines)) == 0


def losses(line: dict) -> str:
    """Mean losses over a round's clients and tasks, by model: "loss federated 1.234, personal 1.120"."""
    return "loss " + ", ".join(means(line, digits=4))


def means(line: dict, *, digits: int) -> list[str]:
    """Of each model, its name and mean loss to so many digits."""
    found = []
    for model, clients in line["losses"].items():
        values = [value for tasks in clients.values() for value in tasks.values()]
        finite = [value for value in values if value is not None]
        mean = f"{statistics.fmean(finite):.{digits}g}" if finite else "-"
        found.append(f"{model} {mean}" + (" (some not finite)" if len(finite) < len(values) else ""))
    return found


def _broken(line: str, width: int) -> str:
    if len(line) <= width:
        return line
    return textwrap.fill(line, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def short(seconds: float) -> str:
    """0.31 s, 5.8 s, 12 s; from a minute on like 2:34 min."""
    return f"{seconds:.2g} s" if seconds < 59.5 else f"{duration(seconds)} min"


def duration(seconds: float) -> str:
    """0:05, 12:34, 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def interactive() -> bool:
    """Whether a screen is there to be read."""
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
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text not in self._said:
            self._said.add(text)
            tqdm.write(text, file=sys.stderr)
            sys.stderr.flush()
