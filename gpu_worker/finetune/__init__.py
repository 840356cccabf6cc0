"""Recovers a pruned model by training (LoRA or all weights). Start with finetune.py."""
