"""Puts the parts of a search process together and runs them. Start with launch.py."""
