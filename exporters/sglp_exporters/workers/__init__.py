"""Worker scripts for isolated environments; each runs with another interpreter and imports nothing of ours."""
