"""RULER: thirteen tasks of any length, made here and scored as published."""
