"""The run: build, loop, record, save, resume."""
