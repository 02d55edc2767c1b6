"""Loading models, building drafters, and telling what a model is like."""
