"""Writes a pruned model as a folder that other programs can load. Start with export.py."""
