"""Raw samples in, a ratio with its interval and a verdict in words out."""
