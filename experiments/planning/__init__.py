"""A roofline model, and estimates of the time, memory and disk of a run that rest on it."""
