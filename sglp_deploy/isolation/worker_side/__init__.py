"""What runs in another interpreter; it goes on that path, so it holds no name of the standard library."""
