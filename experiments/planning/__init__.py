"""What a run will take: a roofline and the estimates made with it."""
