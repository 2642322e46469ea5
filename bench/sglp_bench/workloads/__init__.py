"""A name in, the work every arm of a benchmark gets out, token for token."""
