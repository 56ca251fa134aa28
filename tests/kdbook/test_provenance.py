"""The commit and the notebook behind an exhibit."""

import subprocess

import pytest

from kdbook.provenance import current_commit, notebook_of, of_runs
from kdlib import files, train


@pytest.mark.parametrize(
    "folder", ["kdlib", "kdbook", "notebooks/rco", "results/published", "docs"]
)
def test_a_changed_source_marks_the_commit(tmp_path, monkeypatch, folder):
    monkeypatch.setattr(files, "ROOT", tmp_path)
    assert current_commit() == "unknown"

    def git(*words):
        author = ("-c", "user.name=x", "-c", "user.email=x@y")
        command = ["git", "-C", tmp_path, *author, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "first")
    head = git("rev-parse", "--short=10", "HEAD")
    assert current_commit() == head
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "new.py").touch()
    assert current_commit() == head + ("" if folder == "docs" else "+")


def test_a_notebook_is_found_by_its_exhibit():
    assert notebook_of("rco/table2").name == "03_table2.ipynb"
    assert notebook_of("book/start_here") == files.ROOT / "notebooks/00_start_here.ipynb"
    assert notebook_of("rco/missing") == files.ROOT / "notebooks/rco/missing.ipynb"


def test_a_folder_is_named_without_its_path(tiny, photos):
    (trained,) = train([tiny(data=f"folder:{photos()}", batch=4)])
    about = of_runs([trained])
    assert about["data"] == "photos"
    assert about["data_sets"] == [trained.run.dataset]
    assert about["data_sets"][0].startswith("photos@")
