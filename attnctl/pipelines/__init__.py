"""Whole jobs built from the controls."""
