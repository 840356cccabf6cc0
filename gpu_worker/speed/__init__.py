"""How fast a pruned model is beside its dense one, in the engines that can run it."""
