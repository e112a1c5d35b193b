"""The notebooks run from top to bottom in a fresh kernel, without a warning, and print what is stored in them.

What training has a say in is printed in cells tagged "trained". It moves a little with the compiler's flags and the
processor, so of these cells only the number of printed lines is compared; all others must be equal.

`python tests/test_notebooks.py` runs the notebooks and stores what they give.
"""

import pathlib
import re

import nbclient
import nbformat
import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "launch" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell):
    """What sort of outputs there are, such as a stream or a picture."""
    return [(output.output_type, *sorted(output.get("data", ()))) for output in cell.outputs]


def printed(cell):
    """What a cell shows as text; of a figure that is its size."""
    texts = [output.get("text") or output["data"]["text/plain"] for output in cell.outputs]
    return "".join(texts).count("\n") if "trained" in cell.metadata.get("tags", ()) else texts


def executed(path):
    """The notebook with what a fresh kernel gives, its metadata as they were."""
    notebook = nbformat.read(path, as_version=4)
    metadata = notebook.metadata.copy()
    where = {"metadata": {"path": str(FOLDER)}}
    nbclient.NotebookClient(
        notebook, kernel_name="python3", timeout=600, coalesce_streams=True, record_timing=False, resources=where
    ).execute()
    notebook.metadata = metadata
    return notebook


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """Kernels inherit the flags and the offline switches of conftest.py; nothing compiled or cached is at hand."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)


def test_there_are_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["1_federation", "2_your_own_method", "3_to_pytorch"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_stored(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in code_cells(notebook)] == [*range(1, len(code_cells(notebook)) + 1)]
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert all(set(cell.metadata) <= {"tags"} for cell in notebook.cells)
    assert "pip install -e '.[notebook]' && jupyter lab launch/notebooks" in notebook.cells[0].source
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert not [output for output in outputs if output.get("name") == "stderr" or output.output_type == "error"]
    assert not re.search(r"(?<![\w.])/(home|root|tmp|usr|work|Users)\b", path.read_text())
    assert path.stat().st_size < 400_000


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_gives_what_is_stored(path, kernel):
    stored, fresh = nbformat.read(path, as_version=4), executed(path)
    for before, now in zip(code_cells(stored), code_cells(fresh), strict=True):
        said = [output.text for output in now.outputs if output.get("name") == "stderr"]
        assert not said, f"{now.source}\n{said}"
        assert kinds(before) == kinds(now), now.source
        assert printed(before) == printed(now), now.source


if __name__ == "__main__":
    for path in NOTEBOOKS:
        nbformat.write(executed(path), path)
