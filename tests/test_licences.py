"""The list of licences in launch/docs/installation.md: every dependency once, with what its own metadata say."""

import importlib.metadata
import pathlib
import re
import tomllib

ROOT = pathlib.Path(__file__).parents[1]
WORDS = {
    "Apache-2.0": "apache",
    "MIT": "mit",
    "BSD": "bsd",
    "MIT-CMU": "mit-cmu",
    "MPL-2.0 and MIT": "mpl-2.0 and mit",
    "Matplotlib's, after Python's": "python software foundation",
}


def listed():
    """Package -> licence."""
    page = (ROOT / "launch" / "docs" / "installation.md").read_text(encoding="utf-8")
    table = page.split("| licence | packages |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", table, re.MULTILINE)
    names = [(name, licence) for licence, packages in rows for name in re.sub(r" \([^)]*\)", "", packages).split(", ")]
    assert len(names) == len(dict(names))
    return dict(names)


def test_every_dependency_is_listed_with_its_licence():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = listed()
    assert set(found) == {re.match(r"[\w-]+", line)[0] for line in project["dependencies"]}
    for name, licence in found.items():
        metadata = importlib.metadata.metadata(name)
        fields = [metadata.get("License-Expression"), metadata.get("License"), *metadata.get_all("Classifier", [])]
        assert re.search(rf"\b{WORDS[licence]}\b", " ".join(filter(None, fields)).lower()), name
