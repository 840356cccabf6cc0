"""Tokens per second of a pruned model beside its dense model. Start with speed.py."""
