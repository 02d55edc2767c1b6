"""Loading models, building drafters, and inspecting models."""
