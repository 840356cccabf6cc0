"""The workers, and all code that loads a model: the only package that imports torch. Start with worker/worker.py."""
