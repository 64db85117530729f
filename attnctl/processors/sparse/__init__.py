"""Attention that computes a part of the map, chosen in one of several ways."""
