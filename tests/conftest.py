"""Hypothesis for all tests: how long an example takes says something about the machine, not about the code."""

from hypothesis import HealthCheck, settings

# In a fresh clone the first text it draws takes a second: it builds its tables of characters.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")
