"""Controls that edit with the attention of a source."""
