"""What the commands that measure return, as JSON and for tables. Start with commands.py."""
