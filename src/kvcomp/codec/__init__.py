"""Transform > quantise > codebook > block > page: numbers and bytes, without torch."""
