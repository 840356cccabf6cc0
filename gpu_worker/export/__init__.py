"""A pruned model as files that other programs load."""
