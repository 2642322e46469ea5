"""What each of our JSON files holds, field by field, and the one check that refuses a file that holds anything else."""
