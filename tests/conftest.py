"""Hypothesis for all tests: the same examples every time, however fast the machine is."""

from hypothesis import HealthCheck, settings

# In a fresh clone the first text it draws takes a second: it builds its tables of characters.
settings.register_profile("suite", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")
