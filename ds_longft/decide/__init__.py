"""What is decided for a run before its model is built, from the model's config alone: memory, time, search, advice."""
