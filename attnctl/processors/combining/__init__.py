"""Guidance that puts the predictions of prompt and negative prompt together in its own way."""
