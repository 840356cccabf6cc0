"""Calibration, importance scores, slices and reconstruction. Start with ordered_model.py."""
