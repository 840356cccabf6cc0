"""Loads models of the supported families and estimates their memory. Start with loading.py and families.py."""
