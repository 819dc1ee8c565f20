"""What a network is for: one file for each task, which the line asks."""
