"""Lightning modules and data modules, weightings of positions, exact resumption."""

from drafter.training.weighting import furthest_behind, prefix_confidence, uniform

__all__ = ["furthest_behind", "prefix_confidence", "uniform"]
