"""Artifacts and a workload in, raw times and memory readings out, each block in a fresh process."""
