"""Engine-neutral operators: one folder per op, with its specification, kernels and launcher."""
