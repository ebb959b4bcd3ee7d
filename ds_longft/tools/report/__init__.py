"""One page about a run: what was trained on what, how it went, and what the model can do with its context now."""
