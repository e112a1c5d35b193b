"""The figures of one run, in its folder and in its report: those that `tap-jax report` would draw of it alone."""

import os
from pathlib import Path

from tap_jax.evaluation.finished import read_runs
from tap_jax.evaluation.illustrations import illustrations, text_samples
from tap_jax.evaluation.page import html_page
from tap_jax.evaluation.selection import comparisons
from tap_jax.whole_files import write_file


def illustrate(workdir: str | os.PathLike) -> None:
    """Draws figures/*.png of a finished run, and puts them and sample texts below what its report has.

    Which ones: replacements over the rounds (Figures 3 and 4), training losses, who gains from TAP, reconstructions;
    each where the run has what it shows.

    Args:
      workdir: as `results.write_results` left it, with metrics.jsonl and samples/ where there are any.

    Raises:
      UserError: it cannot be read.
    """
    folder = Path(workdir)
    section = comparisons(read_runs([folder])[0])
    text, files = [(folder / "report.md").read_text(encoding="utf-8")], {}
    drawn = illustrations(section)
    text += ["## Figures\n"] if drawn else []
    for picture in drawn:
        name = f"figures/{picture.name}.png"
        files[name] = picture.png
        text.append(f"![{picture.caption}]({name})\n\n*{picture.caption}.*\n")
    for title, body, _ in text_samples(section):
        text.append(f"## {title}\n\n{body}\n")
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_file(folder / name, content)
    report = "\n".join(text)
    write_file(folder / "report.md", report)
    write_file(folder / "report.html", html_page(report, files))
