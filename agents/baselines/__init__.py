"""Agents that ask no LLM, and the allocations that join the first population. Start with classical.py."""
