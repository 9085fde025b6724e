"""The explorer as a widget: its traits are what a user chooses and what the page shows, ``explorer.js`` draws it.

Everything works without a browser: set a trait and read another.
"""

import io
import os
from dataclasses import fields, replace
from pathlib import Path

import anywidget
import matplotlib.pyplot as plt
import numpy as np
import torch
import traitlets
from matplotlib.figure import Figure

from patchsae.app import pages
from patchsae.app.explorer import Explorer, masked_image
from patchsae.app.pictures import explorer_sheet, scatter_picture
from patchsae.app.state import CELLS, FORMATS, MAX_BYTES, MAX_PIXELS, SCOPES, UPLOAD, State, decode_picture

#: Classes whose probabilities are shown; factors a latent can be scaled with.
SHOWN, STRONGEST = 8, 4.0
MEANINGS = {"patch": "Mean activation on the framed patches.", "image": "Mean activation over all tokens of the image.",
            "class": "Active tokens on the training images of the class (eq. 5).",
            "words": "Share of a latent's reference images that show a concept of this name.",
            "similar": "Cosine between decoder rows.", "scatter": "Latents at the frame in the scatter below.",
            "changed": "Mean activation on this image after adaptation, less that before."}
NAMES = tuple(f.name for f in fields(State))


class ExplorerWidget(anywidget.AnyWidget):
    """The explorer. The traits named as in ``State`` are chosen, the others follow from them."""

    _esm = Path(__file__).with_name("explorer.js")
    _css = pages.style()

    dataset = traitlets.Unicode().tag(sync=True)
    image = traitlets.Int().tag(sync=True)
    region = traitlets.List(traitlets.Int(), [0, 0, 0, 0]).tag(sync=True)
    scope = traitlets.Enum(tuple(SCOPES), "patch").tag(sync=True)
    label = traitlets.Int().tag(sync=True)
    query = traitlets.Unicode().tag(sync=True)
    anchor = traitlets.Int().tag(sync=True)
    box = traitlets.List(traitlets.Int(), [0, 0, 0, 0]).tag(sync=True)
    latent = traitlets.Int().tag(sync=True)
    factors = traitlets.List().tag(sync=True)
    mask = traitlets.Bool(False).tag(sync=True)
    threshold = traitlets.Float(0.0).tag(sync=True)
    hover = traitlets.List(traitlets.Int()).tag(sync=True)
    upload = traitlets.CBytes().tag(sync=True)
    upload_size = traitlets.Int().tag(sync=True)
    asked = traitlets.Int().tag(sync=True)
    answered = traitlets.Int().tag(sync=True)

    page = traitlets.Dict().tag(sync=True)
    sizes = traitlets.Dict().tag(sync=True)
    picture, caption, hint, meaning, link = (traitlets.Unicode().tag(sync=True) for _ in range(5))
    rows = traitlets.List().tag(sync=True)
    detail, probabilities, compared = (traitlets.Dict().tag(sync=True) for _ in range(3))
    place = traitlets.List(traitlets.Float()).tag(sync=True)
    message = traitlets.List(["", ""]).tag(sync=True)

    def __init__(self, explorer: Explorer):
        self.explorer, self.opening = explorer, True
        super().__init__(page=self._page(), sizes={name: len(ds) for name, ds in explorer.datasets.items()})
        # Voila, whose page has an address of its own, passes on what that address asks for.
        self.open_link(os.environ.get("QUERY_STRING", ""))
        self.on_msg(lambda _, content, buffers: self._send_file(content["kind"]))

    @property
    def state(self) -> State:
        """What is chosen now."""
        values = {name: getattr(self, name) for name in NAMES}
        values["factors"] = tuple((int(s), float(f)) for s, f in self.factors)
        return State(**values | {name: tuple(values[name]) for name in ("region", "box")})

    def open_link(self, link: str) -> None:
        """Show the state of a link; one that cannot be shown gives a message and the first state."""
        try:
            given = State.from_link(link)
            known = given.dataset in self.explorer.datasets
            if given != State() and not known:
                raise ValueError(f"The link names the data set {given.dataset!r}, which is not here; choose another.")
            self._set(given if known else self.explorer.first_state())
        except (ValueError, traitlets.TraitError) as error:
            self._set(self.explorer.first_state())
            self.message = ["problem", str(error)]

    def figure(self) -> Figure:
        """What is shown, as a figure."""
        return explorer_sheet(self.explorer, self.state)

    def _page(self) -> dict:
        """What the page has to know once."""
        explorer = self.explorer
        scatter, area = scatter_picture(explorer)
        scopes = [(name, words) for name, words in SCOPES.items() if name != "changed" or explorer.adapted]
        return {"grid": explorer.clip.grid, "latents": explorer.sae.n_latents, "scopes": scopes, "cells": CELLS,
                "classes": explorer.references.class_names, "area": area, "own_page": "QUERY_STRING" in os.environ,
                "scatter": pages.address(scatter, "image/png"), "max_bytes": MAX_BYTES,
                "accept": ",".join(f"image/{name.lower()}" for name in FORMATS),
                "example": f"for example {explorer.references.class_names[0]}",
                "limits": f"Up to {MAX_BYTES // 2**20} MB and {MAX_PIXELS // 10**6} megapixels; kept in memory only."}

    # Keeping what is chosen within what there is

    @traitlets.validate("image", "label", "latent", "anchor")
    def _within(self, proposal) -> int:
        many = {"image": self.sizes.get(self.dataset, 1), "label": len(self.explorer.references.class_names)}
        return _clipped(proposal["value"], many.get(proposal["trait"].name, self.explorer.sae.n_latents))

    @traitlets.validate("region", "box")
    def _inside(self, proposal) -> list[int]:
        """A rectangle (top, left, bottom, right) within the patches or the cells."""
        if len(proposal["value"]) != 4:
            raise traitlets.TraitError("A region is four numbers: top, left, bottom and right; give all of them.")
        rows, columns = CELLS if proposal["trait"].name == "box" else (self.explorer.clip.grid,) * 2
        top, left, bottom, right = (_clipped(v, n) for v, n in zip(proposal["value"], (rows, columns) * 2))
        return [min(top, bottom), min(left, right), max(top, bottom), max(left, right)]

    @traitlets.validate("factors")
    def _scaled(self, proposal) -> list:
        n = self.explorer.sae.n_latents
        factors = {_clipped(int(s), n): float(np.clip(np.nan_to_num(f), 0, STRONGEST)) for s, f in proposal["value"]}
        return [[s, factor] for s, factor in sorted(factors.items()) if factor != 1]

    @traitlets.validate("threshold")
    def _share(self, proposal) -> float:
        return float(np.clip(np.nan_to_num(proposal["value"]), 0, 1))

    # Showing what follows

    @traitlets.observe("dataset", "image")
    def _other_image(self, change) -> None:
        if self.opening:
            return
        self.message = ["", ""]
        if change["name"] == "dataset":
            self.image = min(self.image, self.sizes[self.dataset] - 1)
        self._show()

    @traitlets.observe(*(name for name in NAMES if name not in ("dataset", "image")))
    def _chosen(self, change) -> None:
        self._show()

    def _set(self, state: State) -> None:
        """Choose all of a state at once."""
        self.opening = True
        try:
            for name in NAMES:
                value = getattr(state, name)
                setattr(self, name, [list(v) if isinstance(v, tuple) else v for v in value]
                        if isinstance(value, tuple) else value)
        finally:
            self.opening = False
        self.message = ["", ""]
        self._show()

    def _show(self) -> None:
        """Bring everything shown up to date; what stays the same is not sent."""
        if self.opening:
            return
        state, explorer = self.state, self.explorer
        listed, table = explorer.listed(state), explorer.probabilities(state)
        view = explorer.view(state.dataset, state.image)
        heat = explorer.heat(state)
        with self.hold_sync():
            self.picture = self._picture(view.image, heat)
            self.caption, self.meaning = self._caption(view, table, heat), MEANINGS[state.scope]
            self.rows, self.detail = self._rows(listed), self._detail(state.latent, state.mask, state.threshold)
            self.probabilities, self.compared = self._probabilities(table), self._compared(view, state)
            self.hint = self._hint(state.region)
            self.place = [] if np.isnan(explorer.places[state.latent]).any() else explorer.places[state.latent].tolist()
            self.link = "" if state.dataset == UPLOAD else state.link()

    def _picture(self, image: np.ndarray, heat: np.ndarray) -> str:
        return pages.address(pages.jpeg(masked_image(image, heat, self.threshold) if self.mask else image))

    def _caption(self, view, table, heat: np.ndarray) -> str:
        best = table.loc[table["before"].idxmax()]
        label = f"Labelled {self.explorer.class_names(self.dataset)[view.label]}. " if view.label >= 0 else ""
        black = f" Latent {self.latent} is active on no patch." if self.mask and not heat.any() else ""
        return f"{label}The model says {best['class']}, {best['before']:.0%}.{black}"

    def _hint(self, region) -> str:
        """The strongest latents of a region in a line."""
        state = State(self.dataset, self.image, tuple(region))
        top, left, bottom, right = (n + 1 for n in region)
        spans = (("row", top, bottom), ("column", left, right))
        where = ", ".join(f"{name} {a}" if a == b else f"{name}s {a}-{b}" for name, a, b in spans).capitalize()
        latents = [f"{s} {self.explorer.names[s]}" for s in self.explorer.listed(state)["latent"][:3]]
        return f"{where}: {', '.join(latents) or 'no latent is active'}."

    @traitlets.observe("asked")
    def _answer(self, change) -> None:
        """Tell the page that all it asked for until now is there."""
        self._show()
        self.answered = self.asked

    @traitlets.observe("hover")
    def _hovered(self, change) -> None:
        self.hint = self._hint(self.region if len(self.hover) != 2 else self.hover * 2)

    def _rows(self, listed) -> list[dict]:
        most = listed["value"].abs().max() if len(listed) else 1
        form = "{:,.0f}" if self.scope == "class" else "{:.2f}"
        return [{"latent": int(s), "name": self.explorer.names[int(s)], "text": form.format(v), "less": bool(v < 0),
                 "share": abs(v) / most, "picture": self._thumbnail(int(s))} for s, v in listed.itertuples(index=False)]

    def _thumbnail(self, latent: int) -> str:
        return pages.address(pages.jpeg(self.explorer.thumbnail(latent)))

    def _detail(self, latent: int, mask: bool, threshold: float) -> dict:
        explorer, found = self.explorer, int(self.explorer.found[latent])
        labels, classes = explorer.label_histogram(latent), explorer.top_classes(latent)
        return {"name": explorer.names[latent], "note": f"{found} reference images",
                "references": self._references(latent, mask, threshold), "facts": pages.facts(explorer.stats, latent),
                "labels": [(name, n / found, f"{n} of {found}") for name, n in labels.head(5).items()],
                "classes": [(name, share / classes.iloc[0], f"{share:.0%}") for name, share in classes.items()]}

    def _references(self, latent: int, mask: bool, threshold: float) -> list[dict]:
        images, heats, labels = self.explorer.reference_views(latent)
        shown = [masked_image(i, h, threshold) for i, h in zip(images, heats)] if mask else images
        names = [self.explorer.references.class_names[label] for label in labels]
        return [{"picture": pages.address(pages.jpeg(image)), "label": name} for image, name in zip(shown, names)]

    def _probabilities(self, table) -> dict:
        """The classes that are likeliest before or after, and what each tower says of them."""
        columns = [c for c in table if c != "class"]
        top = table.loc[table[columns].max(axis=1).sort_values(ascending=False, kind="stable").index[:SHOWN]]
        pairs = [columns[i:i + 2] for i in range(0, len(columns), 2)]
        towers = ["CLIP", "MaPLe"][:len(pairs)]
        rows = [[name, *(top.loc[i, pair].tolist() for pair in pairs)] for i, name in top["class"].items()]
        return {"towers": towers, "rows": rows}

    def _compared(self, view, state: State) -> dict:
        """The chosen latent on the image before and after adaptation, and the latents that changed most."""
        if view.adapted_h is None:
            return {}
        explorer, both = self.explorer, (view.h, view.adapted_h)
        means = torch.stack([h.mean(0).cpu() for h in both], 1)
        rows = [(s, explorer.names[s], *means[s].tolist())
                for s in explorer.listed(replace(state, scope="changed"))["latent"].tolist()]
        masks = [masked_image(view.image, explorer.patches(h, state.latent), self.threshold) for h in both]
        return {"towers": ["CLIP", "MaPLe"], "pictures": [pages.address(pages.jpeg(mask)) for mask in masks],
                "rows": rows[:SHOWN], "values": means[state.latent].tolist()}

    # Pictures of one's own, and files to keep

    @traitlets.observe("upload_size")
    def _too_large(self, change) -> None:
        if self.upload_size:
            self.message = ["problem", f"The picture has {self.upload_size / 2**20:.1f} MB, the limit is "
                                       f"{MAX_BYTES // 2**20} MB; choose a smaller file."]
            self.upload_size = 0

    @traitlets.observe("upload")
    def _uploaded(self, change) -> None:
        """Look at a picture from the browser; it stays in memory, and only the last one does."""
        if not self.upload:
            return
        data, self.upload = self.upload, b""
        try:
            picture = decode_picture(data)
        except ValueError as error:
            self.message = ["problem", str(error)]
            return
        self.explorer.take(picture)
        self.sizes = self.sizes | {UPLOAD: 1}
        self.dataset = UPLOAD
        self._show()
        height, width = picture.shape[:2]
        self.message = ["", f"Your picture of {width} x {height} pixels is shown; it stays in memory."]

    def _send_file(self, kind: str) -> None:
        """Send what is shown to the browser, which saves it."""
        state, buffer = self.state, io.BytesIO()
        if kind == "figure":
            figure = self.figure()
            figure.savefig(buffer, format="png")
            plt.close(figure)
        else:
            table = self.explorer.table(state) if kind == "latents" else self.explorer.probabilities(state)
            table.to_csv(buffer, index=False, float_format="%.6g", lineterminator="\n")
        name, mime = ("png", "image/png") if kind == "figure" else ("csv", "text/csv")
        self.send({"name": f"explorer_{kind}.{name}", "type": mime}, [buffer.getvalue()])


def _clipped(value: int, many: int) -> int:
    """The nearest of 0 to ``many`` - 1."""
    return max(0, min(value, many - 1))
