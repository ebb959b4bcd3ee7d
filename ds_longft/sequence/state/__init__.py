"""Layers that carry a state along the sequence: gated delta rules, Mamba, lightning attention, short convolutions."""
