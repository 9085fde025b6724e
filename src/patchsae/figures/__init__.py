"""Figures, ``data -> Figure``: one style, one function a figure, and :func:`save`, which writes it.

``autoencoder`` (curves, sweeps, scatters), ``ablation``, ``adaptation``, ``interpretability``, ``sheets`` (pictures in
rows) and ``schematics`` (drawings of the method) have the figures; ``canvas`` and ``charts`` have what they share.
"""
# ruff: noqa: F401

from patchsae.figures.ablation import masking_curves, masking_differences, prediction_maps, side_curves
from patchsae.figures.adaptation import (
    METHODS,
    activation_scatter,
    area_dots,
    concept_maps,
    confusions,
    group_curves,
    half_dots,
    truth_dots,
)
from patchsae.figures.autoencoder import latent_scatter, pretraining_curves, scatter_panels, sweep, training_curves
from patchsae.figures.canvas import save, save_table
from patchsae.figures.interpretability import (
    concept_dots,
    interpretability_scatter,
    latent_histograms,
    name_curves,
    recovery_dots,
    transfer_dots,
    width_curves,
)
from patchsae.figures.schematics import schematic_ablation, schematic_autoencoder, schematic_overview
from patchsae.figures.sheets import MaskRow, Row, image_rows, layers_grid, mask_rows, style_pair
