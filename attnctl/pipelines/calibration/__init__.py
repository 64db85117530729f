"""Calibrating block-sparse attention."""
