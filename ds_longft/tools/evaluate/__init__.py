"""Does the model use its long context? Loss by position, needles, LongBench, short questions; before, after."""
