"""The same numbers, sooner: sparse step, kernels, oneDNN, processes."""
