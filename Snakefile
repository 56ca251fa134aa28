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
SEEDS = [seed for seed in str(config.get("seeds") or "").split(",") if seed]
ALL = {n.exhibit: n for n in book.notebooks()}
EXHIBITS = [name for name in ALL if name != book.SCORECARD and (not ONLY or name in ONLY)]
CODE = book.code_hash()


def executed(exhibit):
    return RESULTS / "notebooks" / ALL[exhibit].path.relative_to(book.ROOT / "notebooks")


def done(exhibit):
    return RESULTS / ".done" / exhibit.replace("/", "-")


def command(program, exhibit, argument):
    """``program`` on an exhibit's notebook, with the parameters of this profile."""
    parameters = {"profile": PROFILE, "data": DATA}
    values = [f"--set {shlex.quote(f'{k}={json.dumps(v)}')}" for k, v in parameters.items()]
    words = ["python", book.ROOT / "workflow" / program, ALL[exhibit].path, argument]
    return " ".join([*(shlex.quote(str(word)) for word in words), *values])


def shards(exhibit):
    """Jobs that each train one seed of it: what they write when they are done."""
    return [done(f"{exhibit}-seed{seed}") for seed in SEEDS if ALL[exhibit].trains]


def about(exhibit):
    """What a job depends on besides its files, and where its progress goes."""
    return {
        "code": CODE,
        "keep_route": os.environ.get("KDLIB_KEEP_ROUTE", "1"),
        "progress": HOME / "logs" / FOLDER / (exhibit.replace("/", "-") + ".log"),
    }


RUN = (
    "mkdir -p $(dirname {params.progress:q}) && "
    "OMP_NUM_THREADS={threads} KDLIB_PROGRESS=lines KDLIB_LOG={params.progress:q} "
    "{params.command}"
)


rule all:
    input: done(book.SCORECARD)


for name in EXHIBITS:
    for seed in SEEDS if ALL[name].trains else []:
        rule:
            name: f"{book.job_name(name)}_seed{seed}"
            input: ALL[name].path
            output: touch(done(f"{name}-seed{seed}"))
            params:
                **about(f"{name}-seed{seed}"),
                command=command("shard.py", name, seed),
            priority: ALL[name].seconds(PROFILE)
            threads: int(config.get("threads", 1))
            resources: gpu=1
            shell: RUN


# The executed copy is a log: it stays when a job fails. Weights are no outputs either: Snakemake
# would delete them before a job starts, and with them what a killed run resumes from.
for name in EXHIBITS:
    rule:
        name: book.job_name(name)
        input: ALL[name].path, shards(name)
        output: touch(done(name))
        log: executed(name)
        params:
            **about(name),
            command=command("execute.py", name, executed(name)),
        # The longest first, or it would run alone in the end.
        priority: ALL[name].seconds(PROFILE)
        threads: int(config.get("threads", 1))
        resources: gpu=1
        shell: RUN


rule:
    name: book.job_name(book.SCORECARD)
    input: ALL[book.SCORECARD].path, [done(name) for name in EXHIBITS]
    output: touch(done(book.SCORECARD))
    log: executed(book.SCORECARD)
    params:
        code=CODE,
        command=command("execute.py", book.SCORECARD, executed(book.SCORECARD)),
    shell: "{params.command}"
