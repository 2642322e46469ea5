"""Built-in exporters, one format per module; none imports another."""
