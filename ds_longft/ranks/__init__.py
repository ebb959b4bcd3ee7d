"""Processes: who am I, what all agree on, starting and stopping them, one run in a folder."""
