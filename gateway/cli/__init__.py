"""The command line: every operator task, with `--json` for programs."""
