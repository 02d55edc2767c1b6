"""Lightning modules and data modules, position weightings, and exact resumption of interrupted runs."""

from drafter.training.weighting import adaspec, dpace, uniform

__all__ = ["adaspec", "dpace", "uniform"]
