"""Image sources, preprocessing and loading."""
