"""What a search on one machine starts as child processes: Valkey, an LLM, workers. Start with services.py."""
