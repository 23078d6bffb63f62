"""What other parts of PyTorch ask of the operators and modules: one file for each of them."""
