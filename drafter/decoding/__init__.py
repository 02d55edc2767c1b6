"""Speculative decoding and its autoregressive baseline, and measurements of their acceptance and their time."""
