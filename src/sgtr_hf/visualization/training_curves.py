"""Provisional."""


def draw_training_curves(a, b):
    pass
