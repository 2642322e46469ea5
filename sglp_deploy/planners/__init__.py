"""Evidence and a budget in, a decision out: one depth-pruning method per file, found by name in the registry."""
