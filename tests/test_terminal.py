"""What a run prints, where somebody watches and where nobody does."""

import fcntl
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from tap_jax.cli import commands, terminal


class Clock:
    """Seconds, which a test lets pass."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def line(number, **more):
    losses = {"federated": {"0": {"ag_news": 1.0, "vqa": 2.0}, "3": {"vqa": None}}, "personal": {"0": {"vqa": 0.5}}}
    return {"round": number, "losses": losses, "seconds": 2.0, "replacements": [{}, {}]} | more


# --- where nobody watches ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rounds", "most"), [(1, 1), (7, 7), (20, 20), (200, 22), (1001, 22)])
def test_a_pipe_gets_at_most_22_lines_of_rounds(rounds, most, capsys):
    with terminal.Terminal(rounds, bar=False) as screen:
        screen.begin(0)
        for number in range(rounds):
            screen.progress(line(number))
    lines = capsys.readouterr().out.splitlines()
    assert 0.9 * most <= len(lines) <= most
    assert lines[-1].startswith(f"round {rounds}/{rounds}: loss federated 1.5 (some not finite), personal 0.5, 2 repl")


def test_the_first_round_of_a_process_is_no_measure_of_the_others(capsys):
    clock = Clock()
    with terminal.Terminal(10, bar=False, clock=clock) as screen:
        screen.begin(3)
        for number, seconds in ((3, 154.0), (4, 2.0), (5, 4.0), (9, 12.0)):  # 4 to 6, and the last
            clock.now += seconds
            screen.progress(line(number, seconds=seconds))
        assert screen.seconds == 172.0
    found = [text.rpartition("; ")[2] for text in capsys.readouterr().out.splitlines()]
    assert found == ["2:34 min with compiling", "2 s, about 0:10 left", "4 s, about 0:12 left", "12 s"]


def test_what_is_left_after_the_last_round_is_known_after_a_second_pass(capsys):
    clock = Clock()
    with terminal.Terminal(1, bar=False, clock=clock) as screen:
        screen.last({"tap": 3, "local": 3, "fedavg": 1})
        for variant, seconds in (("tap", 90.0), ("local", 5.0), ("tap", 20.0), ("local", 6.0), ("tap", 34.0)):
            clock.now += seconds
            screen.scored(variant)
        screen.scored("local")
        screen.scored("fedavg")
    found = [text.partition("; ")[2] for text in capsys.readouterr().out.splitlines()]
    # The first pass does not count: 26 s for two, then 60 s for three and for four.
    assert found == ["", "", "", "about 0:39 left", "about 0:40 left", "about 0:15 left", ""]


def test_one_pass_has_no_estimate_and_many_have_few_lines(capsys):
    with terminal.Terminal(1, bar=False) as screen:
        screen.last({"tap": 1, "local": 1})
        screen.scored("tap")
        screen.scored("local")
        assert capsys.readouterr().out.splitlines() == ["scored 1/2: tap", "scored 2/2: local"]
        screen.last({"tap": 1000, "fedavg": 1})
        for _ in range(1000):
            screen.scored("tap")
        screen.scored("fedavg")
    assert len(capsys.readouterr().out.splitlines()) <= terminal.LAST_LINES


def test_a_run_that_is_silent_says_what_it_is_at(capsys):
    clock = Clock()
    words = iter(["compiling local training and 7 more", "", ""])
    with terminal.Terminal(2, bar=False, clock=clock, compiling=lambda: next(words)) as screen:
        screen.begin(0)
        for seconds in (3.0, 6.0, 1.0, 8.0):
            clock.now += seconds
            screen.after_silence()
        first = "  round 1/2, the first of this process"
        said = [f"{first}, compiling local training and 7 more, for 9 s", f"{first}, for 18 s"]
        assert capsys.readouterr().out.splitlines() == said
        screen.progress(line(0))
        clock.now += 60
        screen.after_silence()  # how long a round takes is known by now
        screen.doing("tap: scores of 9 texts of vqa, client 3")
        screen.after_silence()
        clock.now += 2
        screen.doing("")
        screen.after_silence()
        lines = capsys.readouterr().out.splitlines()[1:]
    assert lines == ["  tap: scores of 9 texts of vqa, client 3, for 0 s"]


# --- where somebody does -------------------------------------------------------------------------------------------

RUN = """if True:
    from tap_jax.cli import terminal
    with terminal.Terminal(3) as screen:
        screen.say(" ".join(["many words"] * 12))
        screen.doing("reading data, building the model")
        for number in range(0, 100_001, 25_000):
            screen.reading("tiny_imagenet/train", number, 100_000)
        screen.begin(0)
        losses = dict.fromkeys(("federated", "personal", "local"), {"0": {"vqa": 1.23456}})
        for number in range(3):
            screen.progress({"round": number, "losses": losses, "seconds": 2.0})
        screen.last({"tap": 2, "fedavg": 1})
        for variant in ("tap", "tap", "fedavg"):
            screen.scored(variant)
"""


@pytest.mark.parametrize("columns", [50, 80, 120])
def test_a_terminal_gets_bars_that_fit(columns):
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    with subprocess.Popen([sys.executable, "-c", RUN], stdout=child, stderr=child, env=environment) as process:
        os.close(child)
        printed = b""
        while True:
            try:
                part = os.read(parent, 4096)
            except OSError:  # how Linux ends a pseudo-terminal
                break
            if not part:
                break
            printed += part
    os.close(parent)
    assert process.returncode == 0
    drawn = [text for text in re.split(r"[\r\n]+", printed.decode()) if text.strip()]
    assert max(map(len, drawn)) <= columns
    assert drawn[0].endswith(("many", "words"))  # broken between words
    (last,) = [text for text in drawn if text.startswith("rounds 3/3")][-1:]
    fits = ["federated 1.23", "personal 1.23", "local 1.23"][: {50: 1, 80: 3, 120: 3}[columns]]
    assert re.fullmatch(rf"rounds 3/3 \|█+\| 00:0\d, {', '.join(fits)}\s*", last)
    assert any(text.startswith("rounds 0/3") and "round 1/3, the first" in text for text in drawn)
    assert re.match(r"scored 3/3 \|█+\| 00:0\d, fedavg", drawn[-1])


def test_words_are_above_the_bar(capsys):
    with terminal.Terminal(3, bar=True) as screen:
        screen.say("before")
        for number in (1, 2):  # resumed
            screen.progress(line(number))
            screen.say(f"after {number}")
    streams = capsys.readouterr()
    assert streams.out.split() == ["before", "after", "1", "after", "2"]
    assert "3/3" in streams.err and "federated 1.5" in streams.err


# --- pieces --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seconds", "text"), [(5, "0:05"), (754, "12:34"), (3723, "1:02:03"), (90061, "25:01:01")])
def test_duration(seconds, text):
    assert terminal.duration(seconds) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.3141, "0.31 s"), (5.81, "5.8 s"), (59, "59 s"), (153.9, "2:34 min")])
def test_short(seconds, text):
    assert terminal.short(seconds) == text


def test_warnings_of_the_package_are_plain_lines_said_once(capsys):
    with terminal.plain_logging():
        for _ in range(2):
            logging.getLogger("tap_jax.data.places").warning("data: %s stands in for %s", "easy_vqa", "vqa")
        logging.getLogger("tap_jax.data.places").info("not shown")
    assert capsys.readouterr().err == "data: easy_vqa stands in for vqa\n"
    assert logging.getLogger("tap_jax").propagate


def test_a_run_ends_with_the_names_of_what_it_wrote(tmp_path, capsys):
    for name in ("checkpoints", "config.json", "else", "store"):
        (tmp_path / name).mkdir()
    row = {"variant": "tap", "client": 0, "task": "ag_news", "metric": "accuracy", "value": 50.0}
    with terminal.Terminal(1, bar=False) as screen:
        commands._finish(screen, [row], tmp_path)
    assert f"in {tmp_path}: config.json, checkpoints, store\n" in capsys.readouterr().out
