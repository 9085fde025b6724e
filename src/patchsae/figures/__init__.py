"""Figures, ``data -> Figure``: one style, one function a figure, and :func:`save`, which writes it.

``training`` (curves, sweeps), ``latents`` (scatters), ``sheets`` (pictures in rows), ``schematics`` (drawings of the
method), ``ablation``, ``adaptation`` and ``interpretability`` have the figures; ``canvas``, ``charts`` and ``files``
have what they share.
"""

from patchsae.figures.ablation import masking_curves, masking_differences, prediction_maps
from patchsae.figures.adaptation import (
    METHOD_LOOKS,
    activation_scatter,
    concept_maps,
    confusions,
    gain_bars,
    group_curves,
    masking_panels,
    method_dots,
    read_dots,
    sides_curves,
)
from patchsae.figures.files import save, save_table
from patchsae.figures.interpretability import (
    concept_dots,
    interpretability_scatter,
    latent_histograms,
    name_curves,
    recovery_dots,
    transfer_dots,
    width_curves,
)
from patchsae.figures.latents import latent_scatter, scatter_panels
from patchsae.figures.schematics import schematic_ablation, schematic_autoencoder, schematic_overview
from patchsae.figures.sheets import (
    LayerLatent,
    MaskRow,
    Row,
    StyleLatent,
    image_rows,
    layers_grid,
    mask_rows,
    style_pair,
)
from patchsae.figures.training import pretraining_curves, probe_table, sweep, training_curves

__all__ = [
    "METHOD_LOOKS", "LayerLatent", "MaskRow", "Row", "StyleLatent", "activation_scatter", "concept_dots",
    "concept_maps", "confusions", "gain_bars", "group_curves", "image_rows", "interpretability_scatter",
    "latent_histograms", "latent_scatter", "layers_grid", "mask_rows", "masking_curves", "masking_differences",
    "masking_panels", "method_dots", "name_curves", "prediction_maps", "pretraining_curves", "probe_table",
    "read_dots", "recovery_dots", "save", "save_table", "scatter_panels", "schematic_ablation",
    "schematic_autoencoder", "schematic_overview", "sides_curves", "style_pair", "sweep", "training_curves",
    "transfer_dots", "width_curves",
]
