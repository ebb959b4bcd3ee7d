"""Does the model use its long context? Perplexity by position, needles, LongBench, short questions; before and after."""
