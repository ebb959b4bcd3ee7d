"""A batch -> weighted sums of token losses, and what becomes of them: supervised fine-tuning, preference pairs.

`train/engine.make_objective` chooses one.
"""
