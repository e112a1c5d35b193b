"""Metrics, scores of every client, tables."""
