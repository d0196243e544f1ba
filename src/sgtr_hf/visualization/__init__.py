"""Drawings of scene graphs and training curves."""
