"""The command line: `python -m kdbook.cli.<program>`; run_all.sh and the Snakefile call it."""

import sys
import time

STARTED = time.monotonic()  # imports take seconds, too

# papermill imports jsonschema, which would build a parser of URLs. That takes longer than the rest
# of papermill, once for every notebook, and no notebook has a URL to check.
sys.modules.setdefault("rfc3987_syntax", None)


def _hook(kind, error, traceback) -> None:
    """End with a sentence after Ctrl-C, also while a program is still imported."""
    if not issubclass(kind, KeyboardInterrupt):
        return _others(kind, error, traceback)
    print("\nInterrupted. Finished work is kept. The same command continues.", file=sys.stderr)
    raise SystemExit(130)


_others, sys.excepthook = sys.excepthook, _hook
