"""Longer questions: adaptation, remapping, recovery, interpretability, and the tables of many runs."""
