"""Block-sparse attention: one function, several kernels."""
