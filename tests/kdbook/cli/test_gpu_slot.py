"""One GPU for each process of a machine; the tests need no GPU."""

import os
import select
import signal
import subprocess
import sys

import pytest

from kdbook.cli import workflow
from kdbook.cli.gpu_slot import gpu_slot
from kdbook.cli.notebooks import ROOT

HOLD = """
import os, sys
from pathlib import Path
from kdbook.cli.gpu_slot import gpu_slot
with gpu_slot(Path(sys.argv[1])) as held:
    print(held, os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def hold(tmp_path):
    """Start a process that holds one of these GPUs until its standard input is closed."""
    started = []

    def start(gpus):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, tmp_path],
            cwd=ROOT,
            env=os.environ | {"KDLIB_GPUS": gpus, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_two_processes_get_two_gpus_and_a_third_waits(hold):
    first, second = hold("0,1"), hold("0,1")
    got = {process.stdout.readline().strip() for process in (first, second)}
    assert got == {"0 0", "1 1"}
    third = hold("0,1")
    ready, _, _ = select.select([third.stdout], [], [], 1.5)
    assert not ready
    first.stdin.close()
    assert third.stdout.readline().strip() in got


def test_the_gpu_of_a_killed_process_is_free_again(hold):
    first = hold("3")
    assert first.stdout.readline().strip() == "3 3"
    first.send_signal(signal.SIGKILL)
    assert hold("3").stdout.readline().strip() == "3 3"


def test_the_visible_gpus_are_restored_after_the_slot(tmp_path, monkeypatch):
    monkeypatch.setenv("KDLIB_GPUS", "5")
    for before in ("5,6", None):
        if before is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before)
        with gpu_slot(tmp_path) as held:
            assert held == os.environ["CUDA_VISIBLE_DEVICES"] == "5"
        assert os.environ.get("CUDA_VISIBLE_DEVICES") == before


@pytest.mark.parametrize("gpus", [None, ""])
def test_without_gpus_nothing_is_reserved_or_hidden(tmp_path, monkeypatch, gpus):
    monkeypatch.delenv("KDLIB_GPUS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    if gpus is not None:
        monkeypatch.setenv("KDLIB_GPUS", gpus)
    with gpu_slot(tmp_path / "locks") as held:
        assert held is None
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "7"
    assert not (tmp_path / "locks").exists()


def test_run_all_uses_the_visible_gpus(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert [*workflow.gpus()] == ["2", "3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert workflow.gpus() == {}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: H100 (UUID: GPU-1)'\necho 'GPU 1: H100 (UUID: x)'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert workflow.gpus() == {"0": "H100", "1": "H100"}
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert workflow.gpus() == {}
