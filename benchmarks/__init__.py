"""Experiments that print a table. search/ compares proposers, paper/ makes the paper's tables."""
