"""The model card, and converters to the formats of serving engines."""
