"""The evaluation process: prepares the target model once, then measures plans. Start with target.py."""
