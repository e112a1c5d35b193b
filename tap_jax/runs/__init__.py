"""Runs with their files: folders, metrics, checkpoints, exports."""
