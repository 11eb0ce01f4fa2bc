"""Weights and activations of few bits: what they become, and products of them, in plain torch.

precisions.py   which there are, as data without torch
values.py       8 bits by rounding to nearest, INT4 groups and their scales
linear.py       a linear that computes what kernels of that precision do
reference.py    the same in float64, naively
"""
