"""Attention modules and what they share."""
