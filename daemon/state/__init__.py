"""The durable state of a search: Redis and the search's folder. Start with store.py."""
