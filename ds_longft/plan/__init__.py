"""What fits and how long a step takes, from the model's config alone: memory, time, the search, and advice from it."""
