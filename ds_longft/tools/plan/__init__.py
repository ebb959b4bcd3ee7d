"""`ds-longft plan`: what fits, how fast it trains, as a table and a recipe; and a GPU's rates, measured."""
