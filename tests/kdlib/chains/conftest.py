"""Stores in which the teacher and the chains of ``found_students`` are trained."""

import shutil

import pytest
from found_students import TEACHER, chain

from kdlib import KD, train
from kdlib.files import home


@pytest.fixture(scope="session")
def trained_before(tmp_path_factory):
    """A store in which the chain is trained, with and without KD."""
    folder = tmp_path_factory.mktemp("before")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDLIB_HOME", str(folder))
        patch.setenv("KDLIB_RESULTS", str(folder / "no results"))
        patch.setenv("KDLIB_PROGRESS", "quiet")
        train([chain(), chain(KD(TEACHER))])
    return folder


@pytest.fixture
def teacher_is_trained(trained_before, own_folders):
    shutil.copytree(trained_before / TEACHER.id, home() / TEACHER.id)


@pytest.fixture
def all_is_trained(trained_before, teacher_is_trained):
    shutil.copytree(trained_before, home(), dirs_exist_ok=True)
