"""Training: one loop for the float network and, with another objective, for QAT."""
