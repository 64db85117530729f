"""A prompt per region of the picture, inside attention."""
