"""One sample over many ranks: head exchange, attention, sharding, the loss, recomputation."""
