"""Times of kernels and of generation, beside those of an uncompressed cache."""
