"""The CARE network, its checkpoints, its exact rewrites and what it costs."""
