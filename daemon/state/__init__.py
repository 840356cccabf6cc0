"""What of a search survives a restart: Redis and the search's folder. Start with store.py."""
