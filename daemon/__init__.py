"""The search process and the command line; no torch. Start with cli.py, then search/search.py."""
