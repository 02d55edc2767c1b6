"""The commands, one per file: config -> objects -> one call. `python -m experiments.<command> --help` explains each."""

import os

from omegaconf import OmegaConf

# Hydra creates the directory of its own logs before a command sees its config (see composing.with_home).
OmegaConf.register_new_resolver("home", os.path.expanduser, replace=True)
