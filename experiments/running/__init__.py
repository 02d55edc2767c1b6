"""What the commands share: configs, claims, training runs, sweeps, dry runs."""
