"""Perturbed attention in closed form, without a map."""
