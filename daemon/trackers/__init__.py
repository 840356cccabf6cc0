"""Experiment trackers: what a search sends to TensorBoard, MLflow, W&B and Trackio. Each has a process of its own."""
