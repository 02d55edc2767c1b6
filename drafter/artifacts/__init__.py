"""Directories that say what they hold: manifests, rows, storage, locks."""
