"""Text, instructions, responses, and the cache of the target's distributions."""

from drafter.data.target_cache import ExactFormat, SparseFormat

__all__ = ["ExactFormat", "SparseFormat"]
