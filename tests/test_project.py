"""The project's own files hold together: environments, notebooks, generated text."""

import re
import subprocess
import sys
import tomllib

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement

from kdlib.files import ROOT

sys.path.insert(0, str(ROOT / "workflow"))
import book
import headers
import requirements_met

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = [
    Requirement(line) for line in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]
]
CONSTRAINTS = {
    requirement.name.lower(): requirement
    for requirement in map(Requirement, (ROOT / "constraints.txt").read_text().splitlines())
}
NOTEBOOKS = {n.exhibit: nbformat.read(n.path, as_version=4) for n in book.notebooks()}


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda requirement: requirement.name)
def test_constraints_pin_every_requirement_to_a_version_that_satisfies_it(requirement):
    (pin,) = CONSTRAINTS[requirement.name.lower()].specifier
    assert pin.operator == "=="
    assert requirement.specifier.contains(pin.version)


def test_conda_environment_installs_this_project_with_the_constraints():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, pip, lines = environment["dependencies"]
    wanted = PROJECT["requires-python"].removeprefix(">=")
    assert (python, pip) == (f"python={wanted}", "pip")
    assert lines["pip"] == ["--constraint constraints.txt", "--editable .[test]"]


def test_this_environment_satisfies_the_requirements():
    assert requirements_met.missing() == []


def test_generated_headers_and_map_are_up_to_date():
    assert headers.outdated(write=False) == []
    assert headers.readme() == (ROOT / "README.md").read_text()


def test_the_address_stands_in_pyproject_and_in_generated_cells_only():
    typed = []
    for path in ROOT.rglob("*"):
        if path.suffix in {".py", ".md", ".sh", ".yml", ".cff"} and ".venv" not in path.parts:
            typed += [path.name] if headers.ADDRESS in path.read_text() else []
    assert typed == []


@pytest.mark.parametrize("exhibit", NOTEBOOKS)
def test_notebook_keeps_to_the_house_rules(exhibit):
    cells = NOTEBOOKS[exhibit].cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert len(cells) <= 40
    assert max(len(cell.source.splitlines()) for cell in code) <= 25
    assert len(re.findall(r"^# ", text, re.MULTILINE)) == 1
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in code) == 1
    for cell in code:
        golden = "keep_output" in cell.metadata.get("tags", [])
        assert golden == cell.source.startswith("# NBVAL_CHECK_OUTPUT")
        assert golden == bool(cell.outputs) == (cell.execution_count is not None)


def test_every_solution_is_in_a_cell_that_can_be_dropped():
    for exhibit, content in NOTEBOOKS.items():
        checks = sum(bool(re.search(r"check\(\s*answer", cell.source)) for cell in content.cells)
        solved = [c for c in content.cells if "solution" in c.metadata.get("tags", [])]
        code = [cell.source for cell in solved if cell.cell_type == "code"]
        assert checks == len(code), exhibit
        assert all("if answer is None:" in source for source in code), exhibit


def test_code_hash_notices_a_change_of_the_library(monkeypatch, tmp_path):
    (tmp_path / "kdlib").mkdir()
    file = tmp_path / "kdlib" / "a.py"
    monkeypatch.setattr(book, "ROOT", tmp_path)
    file.write_text("one")
    before = book.code_hash()
    file.write_text("two")
    assert book.code_hash() != before


def test_shell_scripts_parse():
    scripts = ("run_all.sh", "run_tests.sh", "workflow/environment.sh", "tests/slurm.sh", ".ci/run")
    for script in scripts:
        assert subprocess.run(["bash", "-n", ROOT / script], check=False).returncode == 0
