"""Calibration, importance scores, slicing and reconstruction. Start with ordered_model.py."""
