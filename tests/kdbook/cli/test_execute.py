"""Execute a notebook: its parameters, its executed copy, its failures."""

import json
import os
import subprocess
import sys

import nbformat
import pytest

from kdbook.cli import execute
from kdbook.cli.notebooks import ROOT


@pytest.fixture
def notebook(tmp_path):
    """Write a notebook with these cells, the first of them tagged ``parameters``."""

    def write(*sources):
        cells = [nbformat.v4.new_code_cell(source) for source in sources]
        cells[0].metadata.tags = ["parameters"]
        metadata = {"kernelspec": {"display_name": "x", "language": "python", "name": "python3"}}
        path = tmp_path / "a.ipynb"
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), path)
        return path

    return write


def test_parameters_keep_their_type_and_the_copy_has_no_path_of_this_machine(tmp_path, notebook):
    output = tmp_path / "out" / "a.ipynb"
    path = notebook("seeds = None", "assert seeds == [1, 2]")
    assert execute.execute(path, output, {"seeds": [1, 2]}) > 0
    assert str(tmp_path) not in output.read_text()
    assert [p.name for p in output.parent.iterdir()] == ["a.ipynb"]


def test_unknown_parameters_are_refused(tmp_path, notebook):
    with pytest.raises(ValueError, match=r"no parameter sede\. Its parameters are: seeds"):
        execute.execute(notebook("seeds = None"), tmp_path / "out.ipynb", {"sede": 1})


def test_a_failed_notebook_is_kept_aside_and_never_accepted(tmp_path, notebook):
    output = tmp_path / "out.ipynb"
    with pytest.raises(execute.papermill.PapermillExecutionError):
        execute.execute(notebook("x = 1", "1 / 0"), output, {})
    assert not output.exists()
    failed = output.with_suffix(".failed.ipynb")
    assert "ZeroDivisionError" in json.dumps(nbformat.read(failed, 4))
    assert {p.name for p in tmp_path.glob("out*")} == {failed.name}
    execute.execute(notebook("x = 1"), output, {})
    assert {p.name for p in tmp_path.glob("out*")} == {output.name}


def test_the_copy_of_a_notebook_that_runs_has_a_neutral_name(tmp_path, notebook):
    cell = f"import pathlib; names = [p.name for p in pathlib.Path('{tmp_path}').glob('out*')]; "
    execute.execute(notebook("x = 1", cell + "print(names)"), tmp_path / "out.ipynb", {})
    printed = nbformat.read(tmp_path / "out.ipynb", 4).cells[-1].outputs[0].text
    assert printed == "['out.running.ipynb']\n"


def test_the_process_that_waits_for_a_notebook_does_not_import_torch():
    code = "import sys, kdbook.cli.execute; print({'torch', 'matplotlib'} & sys.modules.keys())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "set()\n"
