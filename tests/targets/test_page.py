"""launch/targets.py: what it makes of what was compiled."""

import dataclasses
import importlib.util
import json
import pathlib

from tap_jax.errors import UserError
from tap_jax.planning.targets import roofline
from tap_jax.planning.targets.compile import Built, Found
from tap_jax.platforms import GIB, Platform

PATH = pathlib.Path(__file__).parents[2] / "launch" / "targets.py"


def script():
    spec = importlib.util.spec_from_file_location("targets_script", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page(tmp_path):
    made = script()
    built = Built(
        ("h100: 1 x H100", "bfloat16"), ("one",), Platform("gpu", "H100", 80 * GIB, 1e15), 1,
        {"training": roofline.Work(1e15)}, {"training": 3600},
    )  # fmt: skip
    about = {**built._asdict(), "platform": dataclasses.asdict(built.platform)}
    about["work"] = {"training": dataclasses.asdict(built.work["training"])}
    found = [dataclasses.asdict(Found("one", "training", peak=90 * GIB, seconds=60))]
    line = {"key": ["configs/flava.py", "h100", "data", "pieces", False], "built": about, "found": found, "flags": ""}
    text = made.page([json.loads(json.dumps(line))])
    assert "| h100 | one | no | 90 of 80 |" in text
    assert "- does not fit: one wants 90 of 80 GiB" in text
    assert "1 hours of training" in text and "1 programs compiled in 1.0 minutes" in text
    page = tmp_path / "page.md"
    page.write_text(f"before\n{made.BEGIN}old\n{made.END}after\n")
    made.put(page, text)
    assert page.read_text().startswith("before\n") and page.read_text().endswith("after\n")
    assert "old" not in page.read_text() and text in page.read_text()
    made.put(page, text)  # and again
    assert page.read_text().count("does not fit") == 1


def test_each_program_is_kept_as_it_is_found(tmp_path, monkeypatch, capsys):
    """Stopped after one of two programs, the script goes on with the other."""
    made, begun = script(), []

    def compile_all(run, target, *, minutes, say, known, enough):
        begun.append([program.name for program in known])
        if len(begun) == 1:
            enough(Found("one", seconds=1))
            enough(Found("two", problem="not known after 1 minutes"))
            raise UserError("the machine has gone")
        built = Built(("h100",), ("one", "two"), Platform("gpu", "H100", 80 * GIB), 1, {}, {})
        return built, [*known, Found("two", peak=GIB)]

    monkeypatch.setattr(made.session, "compile_all", compile_all)
    monkeypatch.setattr(made.topology, "require", lambda target: None)
    arguments = ["--targets", "h100", "--configs", "configs/flava.py", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["targets.py", "synthetic", "train", *arguments])
    assert made.main() == 1 and "the machine has gone" in capsys.readouterr().err
    assert made.main() == 0 and begun == [[], ["one"]]
    assert made.main() == 0 and len(begun) == 2  # all is known
    assert (tmp_path / "targets.md").read_text().count("| h100 |") == 2


def test_the_benchmarks_have_the_marks():
    made, page = script(), (PATH.parent / "benchmarks.md").read_text()
    assert page.count(made.BEGIN) == page.count(made.END) == 1
