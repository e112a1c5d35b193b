"""The server model; the only place that knows Flax modules."""
