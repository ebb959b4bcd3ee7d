"""From published sets and texts to the rows that are trained on: converted, made, mixed."""
