"""Train, align and measure draft models for speculative decoding (arXiv 2403.00858)."""

__version__ = "0.1.0"
