"""The HTTP API of a search, its token and its metrics. Start with api.py."""
