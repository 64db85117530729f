"""Token mixers that take the place of softmax attention."""
