"""The agents of a search, one class a file: Initializer, Selector, Mutator, Crossover. Start with mutator.py."""
