"""Evaluation: Fréchet distance, precision, recall, reward, accuracy, and the report of a run."""
