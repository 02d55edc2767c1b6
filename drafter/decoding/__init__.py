"""Speculative decoding and its baseline, and what both cost and accept."""
