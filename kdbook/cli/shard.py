"""Train the runs of one notebook for one seed; the notebook finds them in the store later.

python -m kdbook.cli.shard NOTEBOOK SEED [--set NAME=JSON ...]
"""

import argparse
import time
from pathlib import Path

from kdbook.cli.gpu_slot import gpu_slot
from kdbook.cli.notebooks import all_notebooks, parse_arguments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("notebook", type=Path)
    parser.add_argument("seed", type=int)
    arguments = parse_arguments(parser)
    (notebook,) = [n for n in all_notebooks() if n.path == arguments.notebook.resolve()]
    name = f"{notebook.name}, seed {arguments.seed}"
    print(f"  … {name}", flush=True)
    started = time.monotonic()
    with gpu_slot():
        # torch reads which GPUs are visible, so it is imported after the slot is held.
        import kdlib
        from kdbook.cli.declared import declared_runs

        runs = declared_runs(notebook, seeds=[arguments.seed], **arguments.parameters)
        kdlib.train(runs, partial=True)  # the notebook reports runs that fail
    print(f"  ✓ {name} · {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
