"""The papers' headline experiments as recipes, and one runner for all of them."""
