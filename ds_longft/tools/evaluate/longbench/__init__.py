"""LongBench and LongBench-E: tasks, metrics, scores of prediction rows, and the runner that makes such rows."""
