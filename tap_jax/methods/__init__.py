"""Federated algorithms, one file each, beside their pseudocode."""
