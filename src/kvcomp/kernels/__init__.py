"""Kernels. Every backend has the functions of ``reference``: quantise, count_pairs, encode_pages, decompress, attend."""
