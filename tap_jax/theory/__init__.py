"""The convergence bound (arrives with its experiment)."""
