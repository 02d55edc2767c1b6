"""One short script per stage: config -> objects -> one call. `python -m experiments.<stage> --help`."""
