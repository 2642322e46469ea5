"""Where a block runs: a block specification in, its answer and the facts of the place out."""
