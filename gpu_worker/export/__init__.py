"""Writes a pruned model as a folder that other programs load. Start with export.py."""
