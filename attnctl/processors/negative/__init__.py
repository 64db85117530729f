"""What guidance by a negative prompt inside attention needs: its conditioning, its keys, and a call of its own."""
