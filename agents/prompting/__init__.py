"""What the LLM is told and how its replies are read. Start with conversation.py."""
