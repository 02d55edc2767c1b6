"""One short script per stage: config -> objects -> one call. `python -m experiments.<stage> --help`."""

import os
import sys

from omegaconf import OmegaConf

# Hydra takes no flags but its own: `--dry-run` is the setting dry_run=true.
sys.argv[:] = ["dry_run=true" if argument == "--dry-run" else argument for argument in sys.argv]

# Hydra makes the directories of its own logs before a command sees its config (see composing.with_home).
OmegaConf.register_new_resolver("home", os.path.expanduser, replace=True)
