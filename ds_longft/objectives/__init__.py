"""A batch -> weighted sums of token losses."""
