"""Changes of pruning rates, and the surrogate that ranks them: pure. Start with edits.py, then surrogate.py."""
