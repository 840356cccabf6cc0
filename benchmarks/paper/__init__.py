"""Reproduces the tables of the paper, cell by cell and resumable. Start with __main__.py."""
