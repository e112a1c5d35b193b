"""The compiled federated round, the loop around it, and checkpoints."""
