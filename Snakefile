# One job per notebook, then the scorecard. ./run_all.sh calls this file; you can call it yourself:
#   PYTHONPATH=. snakemake --workflow-profile workflow/local --cores 2 --config profile=smoke
import json
import os
import shlex
import sys
from pathlib import Path

sys.path.insert(0, workflow.basedir)
from kdbook.cli.notebooks import ROOT, SCORECARD, all_notebooks, code_hash

PROFILE = config.get("profile", "smoke")
FOLDER = config.get("folder", PROFILE)
DATA = config.get("data")
ONLY = [name for name in str(config.get("only") or "").split(",") if name]
RESULTS = Path(os.environ.get("KDLIB_RESULTS") or ROOT / "results") / FOLDER
HOME = Path(os.environ.get("KDLIB_HOME") or ROOT / "runs")
SEEDS = [seed for seed in str(config.get("seeds") or "").split(",") if seed]
ALL = {n.exhibit: n for n in all_notebooks()}
EXHIBITS = [name for name in ALL if name != SCORECARD and (not ONLY or name in ONLY)]
CODE = code_hash()


def executed(exhibit):
    return RESULTS / "notebooks" / ALL[exhibit].path.relative_to(ROOT / "notebooks")


def done(exhibit):
    return RESULTS / ".done" / exhibit.replace("/", "-")


def command(program, exhibit, argument):
    """The command that runs a program of kdbook.cli on an exhibit's notebook."""
    parameters = {"profile_name": PROFILE, "data": DATA}
    words = ["python", "-m", f"kdbook.cli.{program}", ALL[exhibit].path, argument]
    for name, value in parameters.items():
        words += ["--set", f"{name}={json.dumps(value)}"]
    return shlex.join(map(str, words))


def shards(exhibit):
    """Files that the jobs of the exhibit's seeds write when they have finished."""
    return [done(f"{exhibit}-seed{seed}") for seed in SEEDS if ALL[exhibit].trains]


def about(exhibit):
    """Values besides the input files that a job depends on, and the file for its progress lines."""
    return {
        "code": CODE,
        "keep_route": os.environ.get("KDLIB_KEEP_ROUTE", "1"),
        "progress": HOME / "logs" / FOLDER / (exhibit.replace("/", "-") + ".log"),
    }


# A finished job writes the time into its output: Snakemake compares the content of small files, so
# an empty file would not tell it that an exhibit is newer than the scorecard.
DONE = " && date +%s.%N > {output:q}"
RUN = (
    "mkdir -p $(dirname {params.progress:q}) && "
    "OMP_NUM_THREADS={threads} KDLIB_PROGRESS=lines KDLIB_LOG={params.progress:q} "
    "{params.command}" + DONE
)


# The exhibits are named besides the scorecard, which is up to date if another exhibit was run before.
rule all:
    input: done(SCORECARD), [done(name) for name in EXHIBITS]


for name in EXHIBITS:
    for seed in SEEDS if ALL[name].trains else []:
        rule:
            name: f"{ALL[name].job}_seed{seed}"
            input: ALL[name].path
            output: done(f"{name}-seed{seed}")
            params:
                **about(f"{name}-seed{seed}"),
                command=command("shard", name, seed),
            priority: ALL[name].seconds(PROFILE)
            threads: int(config.get("threads", 1))
            resources: gpu=1
            shell: RUN


# The executed copy is declared as a log, because Snakemake keeps logs when a job fails. Weights are
# not declared as outputs: Snakemake deletes outputs before a job starts, and an interrupted run
# resumes from its weights.
for name in EXHIBITS:
    rule:
        name: ALL[name].job
        input: ALL[name].path, shards(name)
        output: done(name)
        log: executed(name)
        params:
            **about(name),
            command=command("execute", name, executed(name)),
        # The longest job starts first, so that it does not run alone at the end.
        priority: ALL[name].seconds(PROFILE)
        threads: int(config.get("threads", 1))
        resources: gpu=1
        shell: RUN


rule:
    name: ALL[SCORECARD].job
    input: ALL[SCORECARD].path, [done(name) for name in EXHIBITS]
    output: done(SCORECARD)
    log: executed(SCORECARD)
    params:
        code=CODE,
        command=command("execute", SCORECARD, executed(SCORECARD)),
    shell: "{params.command}" + DONE
