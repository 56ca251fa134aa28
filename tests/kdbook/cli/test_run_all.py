"""The command line and the Snakefile, run as a user runs them."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import nbformat
import psutil
import pytest
import torch

from kdbook.cli import forecast, run_all
from kdbook.cli.notebooks import ROOT, all_notebooks
from kdbook.profiles import PROFILES

ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "PATH": os.path.dirname(sys.executable) + ":" + os.environ["PATH"],
}
SNAKEMAKE = [
    *(sys.executable, "-m", "snakemake", "--dry-run", "--cores", "1"),
    *("--workflow-profile", "workflow/local"),
]
PROGRAM = [sys.executable, "-m", "kdbook.cli.run_all"]


def call(*words: str, command=PROGRAM, **kwargs) -> subprocess.CompletedProcess:
    environment = os.environ | ENVIRONMENT | kwargs.pop("env", {})
    return subprocess.run(
        [*command, *words], capture_output=True, text=True, env=environment, **kwargs
    )


@pytest.fixture
def parse(monkeypatch):
    """Parse a command line in this process; the environment is restored afterwards."""
    for option in ("PARALLEL", "KEEP_ROUTE"):
        monkeypatch.setenv(f"KDLIB_{option}", "")

    def parse(*words):
        monkeypatch.setattr(sys, "argv", ["run_all", *words])
        return run_all.parse()

    return parse


def test_the_list_has_every_notebook_and_its_cost(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run_all", "--list"])
    assert run_all.main() == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert "time (smoke)" in head
    for notebook, line in zip(all_notebooks(), lines, strict=True):
        for text in (notebook.exhibit, notebook.path.name, notebook.cost["smoke"], notebook.title):
            assert text in line


def test_snakemake_gets_the_names_of_exhibits(parse, monkeypatch):
    monkeypatch.setenv("KDLIB_GPUS", "")
    command = run_all.snakemake(parse("--only", "stc/table1, kr/04_table1"))
    assert "only=stc/table1,kr/table1" in command


def test_help_describes_every_profile(parse, capsys):
    with pytest.raises(SystemExit) as left:
        parse("--help")
    assert left.value.code == 0
    page = capsys.readouterr().out
    assert all(profile.description in page for profile in PROFILES.values())
    assert max(map(len, page.splitlines())) <= 100


def test_options_reach_the_notebooks(parse, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        (tmp_path / "photos" / split / "cat").mkdir(parents=True)
        shutil.copy(ROOT / "docs" / "scorecard.png", tmp_path / "photos" / split / "cat")
    arguments = parse("--parallel", "3", "--keep-route", "5", "--data", "cifar10=folder:photos")
    assert (os.environ["KDLIB_PARALLEL"], os.environ["KDLIB_KEEP_ROUTE"]) == ("3", "5")
    assert arguments.data == {"cifar10": f"folder:{tmp_path / 'photos'}"}
    assert arguments.profile.folder != "smoke"
    assert any(f"folder={arguments.profile.folder}" == w for w in run_all.snakemake(arguments))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--profile", "smok"], "Did you mean smoke"),
        (["--only", "rco/tabel1"], "Did you mean rco/table1"),
        (["--only", ""], "--only names no exhibit"),
        (["--only", ","], "--only names no exhibit"),
        (["--parallel", "0"], "--parallel: '0' is not a whole number of 1 or more"),
        (["--jobs", "-1"], "--jobs: '-1' is not a whole number of 1 or more"),
        (["--data", "cifar100"], "NAME=DATA"),
        (["--data", "cifar100=folder:/nowhere"], "/nowhere has no folder train/"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_starts(parse, capsys, words, expected):
    with pytest.raises(SystemExit) as left:
        parse(*words)
    assert left.value.code == 2
    assert expected in capsys.readouterr().err


def test_a_wrong_variable_is_refused_too(parse, capsys, monkeypatch):
    monkeypatch.setenv("KDLIB_PARALLEL", "many")
    with pytest.raises(SystemExit):
        parse()
    assert "KDLIB_PARALLEL: 'many' is not a whole number" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="float16 is allowed on a GPU")
def test_float16_on_a_cpu_is_refused_before_anything_starts(parse, capsys, monkeypatch):
    monkeypatch.setenv("KDLIB_PRECISION", "float16")
    with pytest.raises(SystemExit):
        parse()
    assert "KDLIB_PRECISION=float16 needs a GPU" in capsys.readouterr().err


def test_dry_run_names_the_jobs_and_runs_none(tmp_path, monkeypatch, capsys):
    some = [n for n in all_notebooks() if n.exhibit in ("rco/table3", "rco/table1")]
    monkeypatch.setattr(forecast, "all_notebooks", lambda: some)
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)
    monkeypatch.setenv("KDLIB_GPUS", "")
    monkeypatch.setattr(sys, "argv", ["run_all", "--dry-run", "--only", "rco/table3"])
    assert run_all.main() == 0
    printed = capsys.readouterr().out
    assert "would run rco/table3" in printed
    assert "rco/table1" not in printed
    assert not list(tmp_path.rglob("*.ipynb"))
    for name, profile in PROFILES.items():
        assert re.search(rf"^{name} +{re.escape(profile.cost)}$", printed, re.MULTILINE)
    students = [re.search(rf"^{name} +(\d+)  ", printed, re.MULTILINE)[1] for name in PROFILES]
    assert students[0] == "14"  # the runs of Table 1


def test_several_jobs_run_at_once_and_a_second_call_has_nothing_to_do(tmp_path, monkeypatch):
    """With the real Snakemake and two GPUs that are only names; each job holds one of them.

    Table 3 trains nothing. Of Table 1, each of two seeds is a job, and the notebook finds all runs.
    """
    locks = tmp_path / "locks"
    locks.mkdir()
    monkeypatch.setenv("TMPDIR", str(locks))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "one,other")
    first = call("--only", "rco/table3,rco/table1", "--parallel", "2", "--by-seed")
    assert first.returncode == 0, first.stderr
    lines = first.stdout.splitlines()
    done = [
        lines.index(next(t for t in lines if f"✓ rco/02_table1, seed {k}" in t)) for k in (0, 1)
    ]
    begun = [lines.index(f"  … rco/02_table1, seed {k}") for k in (0, 1)]
    assert max(begun) < min(done)
    assert max(done) < lines.index("  … rco/02_table1")
    assert "rco/01_table3, seed" not in first.stdout
    assert {p.stem for p in locks.glob("kdlib-gpus-*/*")} == {"one", "other"}
    logs = tmp_path / "home" / "logs" / "smoke"
    assert all("epoch 8/8" in (logs / f"rco-table1-seed{k}.log").read_text() for k in (0, 1))
    assert not (logs / "rco-table1.log").exists()  # the notebook had nothing left to train
    results = tmp_path / "results" / "smoke"
    assert (results / "scorecard.html").exists()
    for exhibit, notebook in (("rco/table3", "rco/01_table3"), ("rco/table1", "rco/02_table1")):
        assert f"✓ {notebook} " in first.stdout
        assert (results / exhibit / "table.md").exists()
        executed = nbformat.read(results / "notebooks" / f"{notebook}.ipynb", as_version=4)
        assert executed.metadata.papermill.end_time
    # Fewer exhibits and no jobs for seeds: no result changes, so the scorecard does not either.
    assert "Nothing to do" in call("--only", "rco/table1").stdout
    newer = results / ".done" / "rco-table1"
    newer.write_text(f"{float(newer.read_text()) + 1}")
    planned = call("--config", "profile=smoke", "only=rco/table1", command=SNAKEMAKE, cwd=ROOT)
    assert re.findall(r"^rule (\w+):", planned.stdout + planned.stderr, re.MULTILINE) == [
        "book_scorecard",
        "all",
    ]


def test_an_interrupt_stops_all_jobs_and_says_how_to_continue(tmp_path):
    process = subprocess.Popen(
        [*PROGRAM, "--only", "book/start_here"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | ENVIRONMENT,
        start_new_session=True,
        # In a background job of a shell, interrupts are ignored: restore the default.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    log = tmp_path / "home" / "logs" / "smoke" / "book-start_here.log"
    deadline = time.monotonic() + 90
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert log.exists(), "training never started"
    workers = psutil.Process(process.pid).children(recursive=True)
    assert any("ipykernel" in " ".join(worker.cmdline()) for worker in workers)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "The same command continues" in output
    assert psutil.wait_procs(workers, timeout=20)[1] == []
    assert not (tmp_path / "results" / "smoke" / "notebooks" / "00_start_here.ipynb").exists()


@pytest.fixture
def active(monkeypatch):
    """The environment of this test is the active one."""
    monkeypatch.delenv("KDLIB_VENV", raising=False)
    monkeypatch.setenv("VIRTUAL_ENV", sys.prefix)


def test_relative_paths_of_the_caller_become_absolute(tmp_path, active):
    script = f"source {ROOT}/workflow/environment.sh && echo $KDLIB_HOME $PYTHON"
    done = call("-c", script, command=["bash"], cwd=tmp_path, env={"KDLIB_HOME": "store"})
    assert done.stdout.split() == [str(tmp_path / "store"), sys.executable]


def test_an_environment_that_is_only_on_the_path_is_used(tmp_path, active):
    script = f"unset VIRTUAL_ENV CONDA_PREFIX; source {ROOT}/workflow/environment.sh; echo $PYTHON"
    done = call("-c", script, command=["bash"], cwd=tmp_path)
    python = os.path.join(os.path.dirname(sys.executable), "python")
    assert done.stdout.strip() == python, done.stderr


def test_before_it_installs_the_script_says_what_is_missing(tmp_path, active):
    """Without an installation: both Pythons are stubs."""
    for name in ("workflow/environment.sh", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    stubs = {"bin/python": "echo 'torch>=2.6, papermill>=2'; exit 1", ".venv/bin/python": "exit 0"}
    for name, line in stubs.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    script = f"PATH={tmp_path}/bin:$PATH; source workflow/environment.sh; echo $PYTHON"
    done = call("-c", script, command=["bash"], cwd=tmp_path)
    first, second, python = done.stdout.splitlines()
    assert first == f"{tmp_path}/bin/python lacks: torch>=2.6, papermill>=2."
    assert second.startswith(f"Installing the packages into {tmp_path}/.venv")
    assert python == f"{tmp_path}/.venv/bin/python"


def test_an_unknown_part_of_the_tests_is_refused_before_anything_is_installed(tmp_path):
    shutil.copy(ROOT / "run_tests.sh", tmp_path)  # without workflow/ it can install nothing
    done = call("lint", "foo", command=["bash", str(tmp_path / "run_tests.sh")])
    assert done.returncode == 2
    assert done.stderr == "Unknown part 'foo'. Use lint, unit or notebooks.\n"


def test_the_script_runs_the_code_of_its_own_checkout(tmp_path, active):
    (tmp_path / "kdbook").mkdir()
    (tmp_path / "kdbook" / "__init__.py").write_text("raise SystemExit('another checkout')")
    done = call("--help", command=[ROOT / "run_all.sh"], cwd=tmp_path, env={"PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ./run_all.sh")
