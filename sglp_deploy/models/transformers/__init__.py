"""A transformers model in, its layer stack, its pruned configuration and a checkpoint of the kept layers out."""
