"""Prompts, the feedback in them, and the parsing of replies. Start with conversation.py."""
