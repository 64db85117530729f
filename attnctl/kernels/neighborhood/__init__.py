"""Neighbourhood attention: windows that move with the query."""
