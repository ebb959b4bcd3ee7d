"""The run config and the DeepSpeed JSON: declared, read, checked. Nothing here imports torch."""
