"""What the commands share: configs, inputs, training runs, sweeps, progress and dry runs."""
