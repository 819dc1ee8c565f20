"""The run directory and what works in it."""
