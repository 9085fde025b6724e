"""The explorer as a widget: its traits are what a user chooses and what the page shows, ``explorer.js`` draws it.

Everything works without a browser: set a trait and read another. What a page sends is a stranger's: what cannot be
meant is left alone, and nothing that is sent ends in an exception.
"""

import contextlib
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
from patchsae.app.explorer import NO_TEXT, Explorer, View, masked_image
from patchsae.app.pictures import explorer_sheet, scatter_picture
from patchsae.app.state import CELLS, FORMATS, MAX_BYTES, MAX_PIXELS, SCOPES, UPLOAD, State, decode_picture
from patchsae.figures.canvas import png

#: Classes whose probabilities are shown; factors a latent can be scaled with; letters of a query; a number's limit.
SHOWN, STRONGEST, LETTERS, LARGEST = 8, 4.0, 200, 2**53
MEANINGS = {"patch": "Mean activation on the framed patches.", "image": "Mean activation over all tokens of the image.",
            "class": "Active tokens on the training images of the class (eq. 5).",
            "words": "Share of a latent's reference images that show a concept of this name.",
            "similar": "Cosine between decoder rows.", "scatter": "Latents at the frame in the scatter below.",
            "changed": "Mean activation on this image after adaptation, less that before."}
NOT_ADAPTED = "No model adapted to this data set was trained before (notebook 06), so there is none to compare with."
NAMES = tuple(f.name for f in fields(State))
#: The traits that a page may set.
CHOSEN = (*NAMES, "hover", "upload", "upload_size", "asked")


class ExplorerWidget(anywidget.AnyWidget):
    """The explorer. The traits named as in ``State`` are chosen, the others follow from them."""

    _esm = Path(__file__).with_name("explorer.js")
    _css = pages.style()

    dataset = traitlets.Unicode().tag(sync=True)
    image = traitlets.Int().tag(sync=True)
    region = traitlets.List(traitlets.Int(), [0, 0, 0, 0]).tag(sync=True)
    scope = traitlets.Enum(tuple(SCOPES), "patch").tag(sync=True)
    label = traitlets.Int().tag(sync=True)
    query = traitlets.Unicode().tag(sync=True, echo_update=False)  # half a letter cannot be sent back
    anchor = traitlets.Int().tag(sync=True)
    box = traitlets.List(traitlets.Int(), [0, 0, 0, 0]).tag(sync=True)
    latent = traitlets.Int().tag(sync=True)
    factors = traitlets.List().tag(sync=True)
    mask = traitlets.Bool(False).tag(sync=True)
    threshold = traitlets.Float(0.0).tag(sync=True)
    hover = traitlets.List(traitlets.Int()).tag(sync=True)
    upload = traitlets.Union([traitlets.Bytes(), traitlets.Instance(memoryview)]).tag(sync=True, echo_update=False)
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
        self.on_msg(self._send_file)

    @property
    def state(self) -> State:
        """What is chosen now."""
        values = {name: getattr(self, name) for name in NAMES}
        values["factors"] = tuple((int(s), float(f)) for s, f in self.factors)
        return State(**values | {name: tuple(values[name]) for name in ("region", "box")})

    def open_link(self, link: str) -> None:
        """Show the state of a link; one that cannot be shown gives a message and the first state."""
        first = self.explorer.first_state()
        try:
            given = State.from_link(link)
            self._set(first if given == State() else replace(given, dataset=given.dataset or first.dataset))
        except (ValueError, traitlets.TraitError) as error:
            self._set(first)
            self.message = ["problem", str(error)]

    def figure(self) -> Figure:
        """What is shown, as a figure."""
        return explorer_sheet(self.explorer, self.state)

    def _page(self) -> dict:
        """What the page has to know once."""
        explorer = self.explorer
        scatter, area = scatter_picture(explorer)
        adapted = explorer.study.profile.adaptation.tasks
        scopes = [(name, words) for name, words in SCOPES.items() if name != "changed" or adapted]
        limits = f"Up to {MAX_BYTES // 2**20} MB and {MAX_PIXELS // 10**6} megapixels; kept in memory only."
        absent = f" Not on this machine: images of {', '.join(explorer.absent)}." if explorer.absent else ""
        return {"grid": explorer.clip.grid, "latents": explorer.sae.n_latents, "scopes": scopes, "cells": CELLS,
                "classes": explorer.references.class_names, "area": area, "own_page": "QUERY_STRING" in os.environ,
                "scatter": pages.address(scatter, "image/png"), "max_bytes": MAX_BYTES,
                "accept": ",".join(f"image/{name.lower()}" for name in FORMATS),
                "example": f"for example {explorer.references.class_names[0]}", "limits": limits + absent}

    # What a page sends

    def _handle_msg(self, msg: dict) -> None:
        """Pass on what has the form of a page's message."""
        data = msg["content"].get("data")
        if (isinstance(data, dict) and data.get("method") in ("update", "request_state", "custom")
                and isinstance(data.get("state", {}), dict) and data.get("buffer_paths", []) in ([], [["upload"]])):
            super()._handle_msg(msg)

    def set_state(self, sync_data: dict) -> None:
        """Take over the choices of a page that can be."""
        possible = {}
        for name in (name for name in CHOSEN if name in sync_data):
            with contextlib.suppress(traitlets.TraitError, OverflowError):
                self.traits()[name]._validate(self, sync_data[name])
                possible[name] = sync_data[name]
        super().set_state(possible)

    # Keeping what is chosen within what there is

    @traitlets.validate("dataset")
    def _known(self, proposal) -> str:
        if proposal["value"] not in self.sizes:
            raise traitlets.TraitError(f"The link names the data set {proposal['value'][:LETTERS]!r}, which is not "
                                       "here; choose another.")
        return proposal["value"]

    @traitlets.validate("image", "label", "latent", "anchor", "asked", "upload_size")
    def _within(self, proposal) -> int:
        many = {"image": self.sizes.get(self.dataset, 1), "label": len(self.explorer.references.class_names),
                "asked": LARGEST, "upload_size": LARGEST}
        return _clipped(proposal["value"], many.get(proposal["trait"].name, self.explorer.sae.n_latents))

    @traitlets.validate("region", "box", "hover")
    def _inside(self, proposal) -> list[int]:
        """A rectangle (top, left, bottom, right), or a place, within the patches or the cells."""
        name, value = proposal["trait"].name, proposal["value"]
        if len(value) not in ((0, 2) if name == "hover" else (4,)):
            raise traitlets.TraitError("A region is four numbers: top, left, bottom and right; give all of them.")
        size = CELLS if name == "box" else (self.explorer.clip.grid,) * 2
        value = [_clipped(v, n) for v, n in zip(value, size * 2)]
        return value if name == "hover" else [f(value[i::2]) for f in (min, max) for i in (0, 1)]

    @traitlets.validate("factors")
    def _scaled(self, proposal) -> list:
        try:
            pairs = {_clipped(int(s), self.explorer.sae.n_latents): float(f) for s, f in proposal["value"]}
        except (TypeError, ValueError, OverflowError):
            raise traitlets.TraitError("Factors are pairs of a latent and a number; give both.") from None
        factors = {s: float(np.clip(np.nan_to_num(f), 0, STRONGEST)) for s, f in sorted(pairs.items())}
        return [[s, factor] for s, factor in factors.items() if factor != 1]

    @traitlets.validate("threshold")
    def _share(self, proposal) -> float:
        return float(np.clip(np.nan_to_num(proposal["value"]), 0, 1))

    @traitlets.validate("query")
    def _printable(self, proposal) -> str:
        return "".join(letter for letter in proposal["value"][:LETTERS] if letter.isprintable())

    # Showing what follows

    @traitlets.observe(*NAMES)
    def _chosen(self, change) -> None:
        if change["name"] in ("dataset", "image") and not self.opening:
            self.message = ["", ""]
            self.image = min(self.image, self.sizes[self.dataset] - 1)
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

    @contextlib.contextmanager
    def _saying(self):
        """Say what cannot be shown: an image that cannot be read, or that is not the one it was."""
        try:
            yield
        except (ValueError, OSError) as error:
            self.message = ["problem", str(error)]

    def _show(self) -> None:
        """Bring everything shown up to date; what stays the same is not sent."""
        if not self.opening:
            with self._saying():
                self._show_state(self.state)

    def _show_state(self, state: State) -> None:
        explorer = self.explorer
        listed, table = explorer.listed(state), explorer.probabilities(state)
        view, heat = explorer.view(state.dataset, state.image), explorer.heat(state)
        with self.hold_sync():
            self.picture = self._jpeg(view.image, heat) if self.mask else self._jpeg(view.image)
            self.caption, self.meaning = self._caption(view, table, heat), MEANINGS[state.scope]
            if state.scope == "changed" and len(view.towers) == 1:
                self.meaning = NOT_ADAPTED
            self.rows, self.detail = self._rows(listed), self._detail(state.latent)
            self.probabilities, self.compared = self._probabilities(view, table), self._compared(view, state)
            self.hint = self._hint(state.region)
            self.place = [] if np.isnan(explorer.places[state.latent]).any() else explorer.places[state.latent].tolist()
            self.link = "" if state.dataset == UPLOAD else state.link()

    def _jpeg(self, image: np.ndarray, heat: np.ndarray | None = None) -> str:
        """An image as an address; with a heat map, its mask."""
        return pages.address(pages.jpeg(image if heat is None else masked_image(image, heat, self.threshold)))

    def _caption(self, view: View, table, heat: np.ndarray) -> str:
        label = f"Labelled {self.explorer.class_names(self.dataset)[view.label]}. " if view.label >= 0 else ""
        likeliest = table.loc[table["before"].idxmax()] if len(table) else None
        says = f"The model says {likeliest['class']}, {likeliest['before']:.0%}." if len(table) else ""
        black = f" Latent {self.latent} is active on no patch." if self.mask and not heat.any() else ""
        return label + says + black

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
        with self._saying():
            self.hint = self._hint(self.hover * 2 or self.region)

    def _rows(self, listed) -> list[dict]:
        most = listed["value"].abs().max() if len(listed) else 1
        form = "{:,.0f}" if self.scope == "class" else "{:.2f}"
        return [{"latent": int(s), "name": self.explorer.names[int(s)], "text": form.format(v), "less": bool(v < 0),
                 "share": abs(v) / most, "picture": self._jpeg(self.explorer.thumbnail(int(s)))}
                for s, v in listed.itertuples(index=False)]

    def _detail(self, latent: int) -> dict:
        explorer, seen = self.explorer, self.explorer.reference_views(latent)
        heats = seen.heats if self.mask else [None] * len(seen.labels)
        references = [{"picture": self._jpeg(image, heat), "label": explorer.references.class_names[label]}
                      for image, heat, label in zip(seen.images, heats, seen.labels)]
        return {"name": explorer.names[latent], "note": f"{len(references)} reference images", "references": references,
                "facts": pages.facts(explorer.stats, latent), "labels": explorer.label_bars(latent)[:5],
                "classes": explorer.class_bars(latent, 5)}

    def _probabilities(self, view: View, table) -> dict:
        """The classes that are likeliest before or after, and what each tower says of them."""
        columns = [c for c in table if c != "class"]
        top = table.loc[table[columns].max(axis=1).sort_values(ascending=False, kind="stable").index[:SHOWN]]
        pairs = [columns[i:i + 2] for i in range(0, len(columns), 2)]
        rows = [[name, *(top.loc[i, pair].tolist() for pair in pairs)] for i, name in top["class"].items()]
        return {"towers": [tower.name for tower in view.towers], "rows": rows, "note": "" if len(table) else NO_TEXT}

    def _compared(self, view: View, state: State) -> dict:
        """The chosen latent on the image before and after adaptation, and the latents that changed most."""
        if len(view.towers) == 1:
            return {}
        means = torch.stack([h.mean(0).cpu() for h in view.h], 1)
        changed = self.explorer.listed(replace(state, scope="changed"))["latent"].tolist()
        rows = [(s, self.explorer.names[s], *means[s].tolist()) for s in changed[:SHOWN]]
        masks = [self._jpeg(view.image, self.explorer.heat(state, tower)) for tower in range(2)]
        return {"towers": [tower.name for tower in view.towers], "pictures": masks, "rows": rows,
                "values": means[state.latent].tolist()}

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
        data, self.upload = bytes(self.upload), b""
        with self._saying():
            picture = decode_picture(data)
            self.explorer.take(picture)
            self.sizes = self.sizes | {UPLOAD: 1}
            self.dataset = UPLOAD
            self._show()
            height, width = picture.shape[:2]
            self.message = ["", f"Your picture of {width} x {height} pixels is shown; it stays in memory."]

    def _send_file(self, _, content, buffers) -> None:
        """Send what is shown to the browser, which saves it."""
        kind = content.get("kind") if isinstance(content, dict) else None
        if kind not in ("figure", "latents", "probabilities"):
            return
        with self._saying():
            if kind == "figure":
                figure = self.figure()
                name, mime, data = "png", "image/png", png(figure)
                plt.close(figure)
            else:
                table = (self.explorer.table if kind == "latents" else self.explorer.probabilities)(self.state)
                name, mime, data = "csv", "text/csv", table.to_csv(index=False, float_format="%.6g").encode()
            self.send({"name": f"explorer_{kind}.{name}", "type": mime}, [data])


def _clipped(value: int, many: int) -> int:
    """The nearest of 0 to ``many`` - 1."""
    return int(max(0, min(value, many - 1)))  # True is a number too
