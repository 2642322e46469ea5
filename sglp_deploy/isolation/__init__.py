"""A pinned list of packages in, an interpreter that holds them out, and workers that run in it."""
