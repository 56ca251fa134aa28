"""The command line: `python -m kdbook.cli.<program>`; run_all.sh and the Snakefile call it."""
