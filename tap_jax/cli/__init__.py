"""The command line: `tap-jax`, its arguments, what it prints, and how its processes find each other."""
