"""Pruning: a smaller dense network out of a trained one, before it is quantized."""
