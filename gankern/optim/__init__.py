"""Optimizers made of the ops."""

from gankern.optim.rmsprop import RMSprop

__all__ = ["RMSprop"]
