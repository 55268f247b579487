"""Protein language models: through one door, behind one protocol."""
