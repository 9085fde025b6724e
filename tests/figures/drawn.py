"""What a figure shows, read back from its artists."""

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib.collections import PathCollection
from matplotlib.text import Text


def curves(panel):
    """The points ``[n,2]`` of every line that has any and is not a rule across the panel, in the order of drawing."""
    points = [np.asarray(line.get_xydata(), float) for line in panel.lines if line.get_transform() == panel.transData]
    return [p for p in points if len(p)]


def rules(panel):
    """The lines across a panel."""
    return [line for line in panel.lines if line.get_transform() != panel.transData]


def bands(panel):
    """Lowest and highest value at every x of every filled band: dictionaries x -> (low, high)."""
    shown = []
    for band in panel.collections:
        corners = band.get_paths()[0].vertices
        shown.append({x: (corners[corners[:, 0] == x, 1].min(), corners[corners[:, 0] == x, 1].max())
                      for x in np.unique(corners[:, 0])})
    return shown


def dots(panel):
    """Places ``[n,2]`` of the dots of a panel of named rows, and the intervals ``[m,2]`` through them."""
    marked = [line.get_xydata() for line in panel.lines if line.get_marker() not in (None, "None", "")]
    plain = [line[:, 0] for line in curves(panel) if len(line) == 2 and line[0, 1] == line[1, 1]]
    return np.concatenate(marked), np.sort([ends for ends in plain if len(marked)], axis=1)


def offsets(panel):
    """Places ``[n,2]`` of all the dots of a panel's scatters."""
    return np.concatenate([np.ma.filled(scatter.get_offsets(), np.nan) for scatter in panel.collections
                           if isinstance(scatter, PathCollection)])


def texts(figure):
    """Every text of a figure."""
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def legend(figure):
    """The words of a figure's legend."""
    return [text.get_text() for text in figure.legends[0].get_texts()]
