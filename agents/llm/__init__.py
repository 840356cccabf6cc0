"""Requests to LLM endpoints: order, retries, budget, replay. The only wing with openai. Start with chat.py."""
