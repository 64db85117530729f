"""Attention that rows of one batch share: what one picture sees of another while both are made."""
