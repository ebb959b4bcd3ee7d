"""Models: which are supported, how they are loaded, stretched (RoPE), adapted (LoRA), counted and exported."""
