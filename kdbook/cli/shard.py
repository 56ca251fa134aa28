"""Train what a notebook asks for with one seed, for the notebook to find when it runs.

python workflow/shard.py NOTEBOOK SEED [--set NAME=JSON ...]
"""

import argparse
import time
from pathlib import Path

import book
import gpu_slot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("notebook", type=Path)
    parser.add_argument("seed", type=int)
    arguments = book.parse(parser)
    (notebook,) = [n for n in book.notebooks() if n.path == arguments.notebook.resolve()]
    name = f"{notebook.path.parent.name}/{notebook.path.stem}, seed {arguments.seed}"
    print(f"  … {name}", flush=True)
    started = time.monotonic()
    with gpu_slot.gpu_slot():
        from declared import asked_for

        import kdlib

        runs = asked_for(notebook, seeds=[arguments.seed], **arguments.parameters)
        kdlib.train(runs, partial=True)  # what failed is the notebook's to tell
    print(f"  ✓ {name} · {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
