"""The search process."""
