# The graph of notebooks: one job each, then the scorecard. ./run_all.sh calls it; so can you:
#   PYTHONPATH=. snakemake --workflow-profile workflow/local --cores 2 --config profile=smoke
import json
import os
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(workflow.basedir) / "workflow"))
import book

PROFILE = config.get("profile", "smoke")
FOLDER = config.get("folder", PROFILE)
DATA = config.get("data")
ONLY = [name for name in str(config.get("only") or "").split(",") if name]
RESULTS = Path(os.environ.get("KDLIB_RESULTS") or Path(workflow.basedir) / "results") / FOLDER
HOME = Path(os.environ.get("KDLIB_HOME") or Path(workflow.basedir) / "runs")
ALL = {n.exhibit: n for n in book.notebooks()}
EXHIBITS = [name for name in ALL if name != book.SCORECARD and (not ONLY or name in ONLY)]
CODE = book.code_hash()


def executed(exhibit):
    return RESULTS / "notebooks" / ALL[exhibit].path.relative_to(book.ROOT / "notebooks")


def done(exhibit):
    return RESULTS / ".done" / exhibit.replace("/", "-")


def command(exhibit, **parameters):
    values = [f"--set {shlex.quote(f'{k}={json.dumps(v)}')}" for k, v in parameters.items()]
    words = ["python", book.ROOT / "workflow" / "execute.py", ALL[exhibit].path]
    return " ".join([*(shlex.quote(str(w)) for w in (*words, executed(exhibit))), *values])


rule all:
    input: done(book.SCORECARD)


# The executed copy is a log: it stays when a job fails. Weights are no outputs either: Snakemake
# would delete them before a job starts, and with them what a killed run resumes from.
for name in EXHIBITS:
    rule:
        name: book.job_name(name)
        input: ALL[name].path
        output: touch(done(name))
        log: executed(name)
        params:
            code=CODE,
            keep_route=os.environ.get("KDLIB_KEEP_ROUTE", "1"),
            command=command(name, profile=PROFILE, data=DATA),
            progress=HOME / "logs" / FOLDER / (name.replace("/", "-") + ".log"),
        # The longest first, or it would run alone in the end.
        priority: ALL[name].seconds(PROFILE)
        threads: int(config.get("threads", 1))
        resources: gpu=1
        shell:
            "mkdir -p $(dirname {params.progress:q}) && "
            "OMP_NUM_THREADS={threads} KDLIB_PROGRESS=lines KDLIB_LOG={params.progress:q} "
            "{params.command}"


rule:
    name: book.job_name(book.SCORECARD)
    input: ALL[book.SCORECARD].path, [done(name) for name in EXHIBITS]
    output: touch(done(book.SCORECARD))
    log: executed(book.SCORECARD)
    params:
        code=CODE,
        command=command(book.SCORECARD, profile=PROFILE, data=DATA),
    shell: "{params.command}"
