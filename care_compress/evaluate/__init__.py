"""Measuring a model or an artifact on real images."""
