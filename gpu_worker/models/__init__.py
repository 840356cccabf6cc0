"""Loads models of every supported family and computes their memory. Start with loading.py and families.py."""
