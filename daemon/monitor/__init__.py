"""The status of a search, its events, and the screens that show them. Start with status.py."""
