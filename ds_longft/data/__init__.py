"""From files to packs: formats, chat template, tokenising, packing, loading. Numpy and Arrow only, no torch."""
