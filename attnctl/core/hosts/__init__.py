"""Every fact about diffusers: families, rows, schedulers, prompts, words, caches, processors."""
