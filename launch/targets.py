"""The table program x target of launch/benchmarks.md; see launch/targets.sh."""

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable

from tap_jax.config import load_config
from tap_jax.errors import UserError
from tap_jax.planning.targets import fit, report, roofline, session, topology
from tap_jax.planning.targets.compile import Built, Found
from tap_jax.platforms import Platform
from tap_jax.whole_files import write_file

BEGIN, END = "<!-- targets: made by launch/targets.sh -->\n", "<!-- end of targets -->\n"
HEAD = (
    "| target | program | fits | peak GiB of | host GiB | TFLOP | collectives in loops | outside | compiled in"
    " | row loops | at the peak |\n|" + "---|" * 11
)
TARGETS = ("h100", "a100-40", "v5e:2x4", "v4:2x2x1", "v5p:2x2x1")


def main() -> int:
    """Compiles what is asked for and not yet known, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("tokenizer")
    parser.add_argument("--targets", nargs="+", default=TARGETS)
    parser.add_argument("--configs", nargs="+", default=("configs/flava.py", "configs/vilt.py"))
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/targets"))
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    kept, lines, failed = args.out / "results.jsonl", [], False
    if kept.exists():
        lines = [json.loads(line) for line in kept.read_text().splitlines()]
    for config in args.configs:
        for name in args.targets:
            key = [config, name, args.data, args.tokenizer, args.fit]
            before = next((line for line in lines if line["key"] == key), {"key": key, "found": []})
            if "built" in before:
                continue
            others = [line for line in lines if line is not before]

            def keep(line: dict, others=others, key=key) -> None:
                lines[:] = [*others, {"key": key} | line]
                write_file(kept, "".join(json.dumps(line) + "\n" for line in lines))

            try:
                keep(one(config, name, args, [Found(**program) for program in before["found"]], keep))
            except UserError as error:
                print(f"{config} on {name}: {error}", file=sys.stderr)
                failed = True
    wanted = {(config, name) for config in args.configs for name in args.targets}
    text = page([line for line in lines if tuple(line["key"][:2]) in wanted and "built" in line])
    (args.out / "targets.md").write_text(text)
    print(text, end="")
    if args.write:
        put(pathlib.Path("launch/benchmarks.md"), text)
    return int(failed)


def one(config: str, name: str, args: argparse.Namespace, known: list[Found], keep: Callable[[dict], None]) -> dict:
    """What is found of one configuration on one target, ready for JSON.

    Args:
      known: its programs that were compiled before.
      keep: is given what has been found so far, after each program.
    """
    fields = {"data.root": args.data, "data.tokenizer": args.tokenizer, "model.weights": ""}
    run, target = load_config(config, fields), topology.parse(name)
    topology.require(target)
    limits = {"minutes": args.minutes, "say": lambda line: print(f"{config} on {name}: {line}", file=sys.stderr)}
    flags = ""
    if args.fit:
        choice, _, _ = fit.fit(run, target, **limits)
        run, flags = load_config(config, fields | choice.fields), choice.flags
    compiled = [program for program in known if not program.problem]

    def after(program: Found) -> bool:
        compiled.append(program)
        keep({"found": [dataclasses.asdict(program) for program in compiled]})
        return True

    built, found = session.compile_all(run, target, **limits, known=tuple(compiled), enough=after)
    about = {**built._asdict(), "platform": dataclasses.asdict(built.platform)}
    about["work"] = {phase: dataclasses.asdict(work) for phase, work in built.work.items()}
    return {"built": about, "found": [dataclasses.asdict(program) for program in found], "flags": flags}


def page(lines: list[dict]) -> str:
    """Markdown: a table for each configuration, and lines on what was chosen, does not fit, and would take."""
    out = []
    for config in dict.fromkeys(line["key"][0] for line in lines):
        notes, rows = [], []
        for line in (line for line in lines if line["key"][0] == config):
            about = dict(line["built"])
            about["platform"] = Platform(**about["platform"])
            about["work"] = {phase: roofline.Work(**work) for phase, work in about["work"].items()}
            built, found = Built(**about), [Found(**program) for program in line["found"]]
            rows += report.markdown(line["key"][1], built, found)
            notes.append(f"- {'; '.join(built.about)}{'; ' + line['flags'] if line['flags'] else ''}")
            notes += [f"  - {problem}" for problem in report.problems(built, found)]
            notes += [f"  - {hours}"] if (hours := report.estimate(built)) else []
            total = sum(program.seconds for program in found)
            notes.append(f"  - {len(found)} programs compiled in {total / 60:.1f} minutes")
        out += [f"`{config}`:\n", HEAD, *rows, "", *notes, ""]
    return "\n".join(out)


def put(path: pathlib.Path, text: str) -> None:
    """Into the page, between its marks."""
    whole = path.read_text()
    before, rest = whole.split(BEGIN)
    path.write_text(before + BEGIN + "\n" + text + "\n" + END + rest.split(END)[1])


if __name__ == "__main__":
    sys.exit(main())
