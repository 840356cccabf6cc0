"""The workers, and everything that loads a model: the only package with torch. Start with worker/worker.py."""
