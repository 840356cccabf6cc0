"""Results of the commands that prune and measure, as JSON. Start with commands.py."""
