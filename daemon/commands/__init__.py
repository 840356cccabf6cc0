"""Flags, words and tables of the commands; what they run is in gpu_worker. Start with pruning.py."""
