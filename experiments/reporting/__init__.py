"""From counts to tables, figures and pages; needs neither torch nor Hydra."""
