"""One short script per stage: config -> objects -> one call. `python -m experiments.<stage> --help`."""

import sys

# Hydra takes no flags but its own: `--dry-run` is the setting dry_run=true.
sys.argv[:] = ["dry_run=true" if argument == "--dry-run" else argument for argument in sys.argv]
