"""Figures, ``data -> Figure``: one style, one function a figure, and :func:`save`, which writes it."""

from patchsae.figures.plots import *  # noqa: F403
