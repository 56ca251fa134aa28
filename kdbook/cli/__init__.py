"""The command line: `python -m kdbook.cli.<program>`, called by run_all.sh and the Snakefile."""
