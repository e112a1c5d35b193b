"""Client models for PyTorch (arrives with the conversion of pre-trained weights)."""
