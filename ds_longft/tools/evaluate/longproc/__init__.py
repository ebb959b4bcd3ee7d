"""LongProc: long procedures written out step by step, from the user's copy of its data."""
