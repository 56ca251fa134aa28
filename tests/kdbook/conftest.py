"""Fixtures of packs: two machines, and runs of which one teaches the other."""

import pytest

from kdlib import KD
from kdlib.engine.train import CACHES


@pytest.fixture
def out(tmp_path):
    return tmp_path / "pack"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Go on at another machine: a store and results of their own, empty at first."""

    def go_to(name):
        for variable in ("HOME", "RESULTS"):
            monkeypatch.setenv(f"KDLIB_{variable}", str(tmp_path / name / variable))
        CACHES.clear()

    return go_to


@pytest.fixture
def family(tiny):
    """A teacher and its student."""
    teacher = tiny()
    return [teacher, tiny(seed=1, method=KD(teacher))]
