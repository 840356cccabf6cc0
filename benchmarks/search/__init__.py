"""Compares proposers at the same budget. Start with compare_search.py."""
