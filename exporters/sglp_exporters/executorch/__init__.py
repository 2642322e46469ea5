"""A pruned model in, one ``.pte`` program out, and a worker with its runtime to run it."""
