"""Editing videos and images with a text prompt."""
