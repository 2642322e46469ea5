"""A pruned model in, a checkpoint of its own library out, and eager PyTorch to run it."""
