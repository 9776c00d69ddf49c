"""Second moments of layer inputs: accumulate, capture, collect, store."""
