"""The command line, the papermill wrapper and the graph, run as a user runs them."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import nbformat
import psutil
import pytest

from kdlib.files import ROOT

sys.path.insert(0, str(ROOT / "workflow"))
import book
import execute
import forecast


def run_all(*words: str, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "workflow" / "run_all.py", *words]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PATH": os.path.dirname(sys.executable) + ":" + os.environ["PATH"],
    }
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, **kwargs
    )


def test_list_names_every_notebook_and_its_cost():
    done = run_all("--list")
    assert done.returncode == 0
    for word in ("book/start_here", "rco/table1", "rco/table2", "rco/table3", "cost (smoke)"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("cost", "seconds"),
    [
        ("under a minute", 30),
        ("about two minutes", 120),
        ("about 10 min on a T4 (estimate)", 600),
        ("about 3 days on an H200 (estimate)", 3 * 86_400),
        ("about 2 h on one CPU core", 7200),
        ("the same", 0),
    ],
)
def test_what_a_cost_says_is_understood(cost, seconds):
    notebook = book.Notebook(ROOT, "rco/table1", "", {"paper": cost}, trains=True)
    assert notebook.seconds("paper") == seconds


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--profile", "smok"], "Did you mean smoke"),
        (["--only", "rco/tabel1"], "Did you mean rco/table1"),
        (["--lanes", "0"], "--lanes 0: it takes 1 or more"),
        (["--data", "cifar100"], "NAME=folder:PATH"),
        (["--data", "cifar100=folder:/nowhere"], "/nowhere has no folder train/"),
        (["--data", "cifar100=digit"], "Did you mean digits"),
        (["--data", "cifar1000=digits"], "Did you mean cifar100"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_starts(words, expected):
    done = run_all(*words)
    assert done.returncode == 2
    assert expected in done.stderr


def test_dry_run_names_the_jobs_and_runs_none(tmp_path):
    done = run_all("--dry-run", "--only", "rco/table3")
    assert done.returncode == 0
    assert "would run rco/table3" in done.stdout
    assert "rco/table1" not in done.stdout
    assert not list(tmp_path.rglob("*.ipynb"))
    for profile in ("smoke", "course", "paper"):  # what each costs
        assert re.search(rf"^{profile} +\d", done.stdout, re.MULTILINE)


def test_several_jobs_run_at_once_and_a_second_call_has_nothing_to_do(tmp_path, monkeypatch):
    """With the real Snakemake; the two GPUs are names alone, and each job holds one of them.

    Table 3 trains nothing; of Table 1 each of two seeds is a job, and the notebook finds all.
    """
    locks = tmp_path / "locks"
    locks.mkdir()
    monkeypatch.setenv("TMPDIR", str(locks))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "one,other")
    words = ("--only", "rco/table3,rco/table1", "--lanes", "2", "--by-seed")
    first = run_all(*words)
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
    assert all("epoch 12/12" in (logs / f"rco-table1-seed{k}.log").read_text() for k in (0, 1))
    assert not (logs / "rco-table1.log").exists()  # nothing was left for the notebook
    results = tmp_path / "results" / "smoke"
    assert (results / "scorecard.html").exists()
    for exhibit, notebook in (("rco/table3", "rco/01_table3"), ("rco/table1", "rco/02_table1")):
        assert f"✓ {notebook} " in first.stdout
        assert (results / exhibit / "table.md").exists()
        executed = nbformat.read(results / "notebooks" / f"{notebook}.ipynb", as_version=4)
        assert executed.metadata.papermill.end_time
    assert "nothing to do" in run_all(*words).stdout


def test_interrupt_ends_cleanly_and_says_that_nothing_is_lost(tmp_path):
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PATH": os.path.dirname(sys.executable) + ":" + os.environ["PATH"],
    }
    process = subprocess.Popen(
        [sys.executable, ROOT / "workflow" / "run_all.py", "--only", "book/start_here"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        start_new_session=True,
        # A job in the background of a shell inherits that interrupts are ignored.
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
    assert "the same command goes on from there" in output
    assert psutil.wait_procs(workers, timeout=20)[1] == []
    assert not (tmp_path / "results" / "smoke" / "notebooks" / "00_start_here.ipynb").exists()


def test_relative_folders_are_the_callers(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "KDLIB_VENV"}
    environment |= {
        "VIRTUAL_ENV": sys.prefix,
        "PATH": os.path.dirname(sys.executable) + ":" + os.environ["PATH"],
        "KDLIB_HOME": "store",
    }
    script = f"source {ROOT}/workflow/environment.sh && echo $KDLIB_HOME $PYTHON"
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.stdout.split() == [str(tmp_path / "store"), sys.executable]


def small_notebook(path, *sources):
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    cells[0].metadata.tags = ["parameters"]
    metadata = {"kernelspec": {"display_name": "x", "language": "python", "name": "python3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), path)
    return path


def test_parameters_arrive_typed(tmp_path):
    notebook = small_notebook(tmp_path / "a.ipynb", "seeds = None", "assert seeds == [1, 2]")
    output = tmp_path / "out" / "a.ipynb"
    assert execute.execute(notebook, output, {"seeds": [1, 2]}) > 0
    assert output.exists()


def test_an_executed_copy_does_not_tell_where_it_was_made(tmp_path):
    notebook = small_notebook(tmp_path / "a.ipynb", "seeds = None", "pass")
    output = tmp_path / "out" / "a.ipynb"
    execute.execute(notebook, output, {})
    assert str(tmp_path) not in output.read_text()


def test_unknown_parameters_are_refused(tmp_path):
    notebook = small_notebook(tmp_path / "a.ipynb", "seeds = None")
    with pytest.raises(ValueError, match="no parameter sede"):
        execute.execute(notebook, tmp_path / "out.ipynb", {"sede": 1})


def test_a_failed_notebook_is_kept_aside_and_never_accepted(tmp_path):
    notebook = small_notebook(tmp_path / "a.ipynb", "x = 1", "1 / 0")
    output = tmp_path / "out.ipynb"
    with pytest.raises(execute.papermill.PapermillExecutionError):
        execute.execute(notebook, output, {})
    assert not output.exists()
    assert "ZeroDivisionError" in json.dumps(nbformat.read(output.with_suffix(".failed.ipynb"), 4))


def test_notebooks_ask_the_same_of_a_run():
    """Where one asked for more checkpoints, it would make another's run train again."""
    asked = {}
    for profile in ("course", "paper"):
        for notebook in book.notebooks():
            pending = forecast.declared(notebook, profile=profile)
            for run in pending:
                asked.setdefault(run.id, set()).add((run.keep, run.route))
                pending += {teacher.id: teacher for teacher, _ in run.parents}.values()
    assert {run: wishes for run, wishes in asked.items() if len(wishes) > 1} == {}


def test_a_thinner_route_costs_less(monkeypatch):
    notebook = next(n for n in book.notebooks() if n.exhibit == "rco/table7")
    whole = forecast.forecast(forecast.declared(notebook, profile="paper"))
    monkeypatch.setenv("KDLIB_KEEP_ROUTE", "10")
    thinned = forecast.forecast(forecast.declared(notebook, profile="paper"))
    assert whole.route > 8 * thinned.route
    assert whole.student_epochs == thinned.student_epochs
    assert whole.banked < whole.live / 2
