"""A block's raw samples or an arm's memory in, the numbers that are compared and reported out: one object each."""
