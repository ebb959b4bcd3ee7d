"""Looking at a data set: tokenized, counted, drawn, one row or pack as the model sees it."""
