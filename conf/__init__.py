"""Hydra's configs: one primary file per stage, and the groups they choose from."""
