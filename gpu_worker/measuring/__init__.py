"""The texts that models are measured on, perplexity, and divergence. Start with perplexity.py."""
