"""A pruned model in, a checkpoint with its launch arguments out, and vLLM to run it."""
