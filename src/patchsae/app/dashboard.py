"""The dashboard: a page per latent and an index, which open from the file system with no server and no network.

``patchsae dashboard`` writes ``figures/<profile>/dashboard/``.
"""

import base64
import contextlib
import errno
import json
import re
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from tqdm.auto import tqdm

from patchsae.app import pages
from patchsae.app.explorer import Explorer, seen
from patchsae.app.pictures import scatter_picture
from patchsae.app.state import CELLS
from patchsae.figures.canvas import resampled
from patchsae.studies.study import open_study

#: Pages are written for all latents up to this many; of more, for those of lowest label entropy.
MOST = 4096
#: Reference images are shown at most this large, in pixels; a latent has this many neighbours and bins a histogram.
SIDE, NEIGHBOURS, BINS = 96, 8, 40
#: Seconds after which an unfinished folder is nobody's any more: a day.
STALE = 86400
HERE = Path(__file__).parent
PAGES = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
                    lstrip_blocks=True)


def chosen_latents(explorer: Explorer, ranges: str = "") -> list[int]:
    """Latents to write pages for: ``"0-99,512"``, or by default all, and of too many the ``MOST`` of lowest entropy."""
    n = explorer.sae.n_latents
    if not ranges:
        entropy = explorer.stats.label_entropy.nan_to_num(torch.inf)
        return sorted(entropy.sort(stable=True).indices[:MOST].tolist())
    if not re.fullmatch(r"\d{1,9}(-\d{1,9})?(,\d{1,9}(-\d{1,9})?)*", ranges.replace(" ", "")):
        raise ValueError(f"LATENTS is {ranges!r}; write numbers and ranges such as 0-99,512.")
    ends = [[int(end) for end in part.split("-")] for part in ranges.replace(" ", "").split(",")]
    latents = sorted({s for end in ends for s in range(min(end[0], n), min(end[-1], n) + 1)})
    if not latents or latents[-1] >= n:
        raise ValueError(f"LATENTS is {ranges!r}, but the autoencoder has latents 0 to {n - 1}; choose among them.")
    return latents


@torch.no_grad()
def reference_pass(explorer: Explorer, latents: Sequence[int], batch_images: int = 64) -> tuple[dict, np.ndarray]:
    """Look once at every image that is a reference of one of the latents.

    Returns small images, position -> uint8 ``[h,w,3]``, and soft masks uint8 ``[n,k,g,g]``: activation on the patches
    of each reference image, from its lowest (0) to its highest (255).
    """
    clip, sae, g = explorer.clip, explorer.sae, explorer.clip.grid
    rows = explorer.stats.reference_rows[list(latents)].numpy()
    small, masks, where = {}, np.zeros((*rows.shape, g, g), np.uint8), np.unique(rows[rows >= 0])
    for at in tqdm(range(0, len(where), batch_images), desc=f"{len(where)} reference images", mininterval=1):
        batch = where[at:at + batch_images].tolist()
        shown, pixels = seen(clip, [explorer.references[row].image for row in batch])
        z = clip.below(pixels, explorer.layer)[:, 1:clip.n_tokens]
        for i, row in enumerate(batch):
            small[row] = shown[i] if clip.image_size <= SIDE else resampled(shown[i], SIDE)
            places = np.nonzero(rows == row)
            heat = sae.encode_some(z[i], [latents[n] for n in places[0]])
            masks[places] = _shares(heat).T.reshape(-1, g, g)
    return small, masks


def _shares(heat: torch.Tensor) -> np.ndarray:
    """Activations ``[g*g,n]`` from the lowest patch (0) to the highest (255), uint8; as ``masks.soft_mask`` has it."""
    low, high = heat.amin(0), heat.amax(0)
    share = torch.where(high > low, (heat - low) / (high - low), (high > 0).float())
    return (255 * share).round().byte().cpu().numpy()


def write_dashboard(explorer: Explorer, folder: Path, title: str, latents: Sequence[int]) -> None:
    """Write the pages into a folder of their own beside ``folder``, and put it in its place when all are there."""
    for left in folder.parent.glob(f".{folder.name}.*"):  # by a process that was killed
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > STALE:
                shutil.rmtree(left)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as beside:
            _write_pages(explorer, Path(beside) / "pages", title, latents)
            _put_in_place(Path(beside) / "pages", folder)
    except OSError as error:
        raise OSError(f"Cannot write {folder}: {error.strerror or error}; free space there or choose a folder that can "
                      "be written to.") from error


def _write_pages(explorer: Explorer, folder: Path, title: str, latents: Sequence[int]) -> None:
    for name in ("latents", "strips"):
        (folder / name).mkdir(parents=True)
    small, masks = reference_pass(explorer, latents)
    template = PAGES.get_template("dashboard_latent.html")
    histograms, near = _histograms(explorer), neighbours(explorer, latents)
    for n, latent in enumerate(tqdm(latents, desc="pages", mininterval=1)):
        page = _latent(explorer, latent, latents, n) | {
            "title": title, "neighbours": near[n], "mask": base64.b64encode(masks[n].tobytes()).decode(),
            "histograms": histograms}
        (folder / "latents" / f"{latent}.html").write_text(template.render(page), encoding="utf-8")
        if rows := [row for row in explorer.stats.reference_rows[latent].tolist() if row >= 0]:
            strip = np.concatenate([small[row] for row in rows], axis=1)
            (folder / "strips" / f"{latent}.jpg").write_bytes(pages.jpeg(strip, 80))
    _write_index(explorer, folder, title, latents)


def _put_in_place(pages_written: Path, folder: Path) -> None:
    """Rename a folder; what was in its place goes, also what another process has put there meanwhile."""
    while pages_written.exists():
        with contextlib.suppress(FileNotFoundError):
            folder.rename(Path(tempfile.mkdtemp(dir=pages_written.parent)) / "before")
        try:
            pages_written.rename(folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise


def _latent(explorer: Explorer, latent: int, latents: Sequence[int], n: int) -> dict:
    """What the page of a latent says."""
    found, names = int(explorer.n_references[latent]), explorer.references.class_names
    labels = explorer.stats.reference_labels[latent, :found].tolist()
    values = explorer.stats.reference_values[latent, :found].tolist()
    return {"latent": latent, "name": explorer.names[latent], "found": found, "grid": explorer.clip.grid,
            "before": latents[n - 1], "after": latents[(n + 1) % len(latents)],
            "references": [(names[label], value) for label, value in zip(labels, values)],
            "facts": pages.facts(explorer.stats, latent), "labels": explorer.label_bars(latent),
            "classes": explorer.class_bars(latent, 8)}


@torch.no_grad()
def neighbours(explorer: Explorer, latents: Sequence[int]) -> list[list[tuple[int, str, float]]]:
    """For each latent those of the others whose decoder rows are nearest by cosine: (latent, name, cosine)."""
    rows = torch.nn.functional.normalize(explorer.sae.W_dec[list(latents)], dim=1)
    nearest = []
    for n, row in enumerate(rows):
        cosine = rows @ row
        cosine[n] = -2  # a latent is not its own neighbour
        best = cosine.topk(min(NEIGHBOURS, len(rows) - 1))
        others = [latents[i] for i in best.indices.tolist()]
        nearest.append([(s, explorer.names[s], value) for s, value in zip(others, best.values.tolist())])
    return nearest


def _histograms(explorer: Explorer) -> list[dict]:
    """Of each statistic its name, its value for every latent ``[S]``, and its histogram: bars from 0 to 1, its ends."""
    table = explorer.stats.table()
    with np.errstate(divide="ignore"):
        values = {"log10 frequency": np.log10(table["frequency"]), "log10 mean activation": np.log10(
            table["mean_activation"]), "label entropy, nats": table["label_entropy"]}
    histograms = []
    for name, value in values.items():
        heights, edges = np.histogram(value[np.isfinite(value)], BINS)
        histograms.append({"name": name, "of": value.tolist(), "bars": (heights / max(1, heights.max())).tolist(),
                           "low": edges[0], "high": edges[-1]})
    return histograms


def _write_index(explorer: Explorer, folder: Path, title: str, latents: Sequence[int]) -> None:
    """The index, what it searches in, and the files that all pages share."""
    picture, area = scatter_picture(explorer)
    (folder / "scatter.png").write_bytes(picture)
    stats, rows = explorer.stats, []
    for latent in latents:
        numbers = [float(t[latent]) for t in (stats.frequency, stats.mean_activation, stats.label_entropy)]
        classes = ", ".join(name for name, _, _ in explorer.class_bars(latent, 3))
        rows.append([latent, explorer.names[latent], classes, int(explorer.n_references[latent]),
                     *(float(f"{v:.4g}") if np.isfinite(v) else None for v in numbers),
                     *(round(float(v), 2) if np.isfinite(v) else None for v in explorer.places[latent])])
    (folder / "latents.js").write_text(f"const LATENTS = {json.dumps(rows)};\n", encoding="utf-8")
    (folder / "pages.css").write_text(pages.style(), encoding="utf-8")
    shutil.copy(HERE / "dashboard.js", folder)
    page = PAGES.get_template("dashboard_index.html").render(
        title=title, many=len(latents), of=explorer.sae.n_latents, images=stats.n_images, area=area, cells=CELLS)
    (folder / "index.html").write_text(page, encoding="utf-8")


def run(name: str | None, ranges: str) -> str:
    """Write the dashboard of a profile."""
    begin, explorer = time.monotonic(), Explorer(open_study(name))
    profile, latents = explorer.study.profile, chosen_latents(explorer, ranges)
    folder = profile.figures_dir / "dashboard"
    write_dashboard(explorer, folder, f"{profile.data.task}, profile {profile.name}", latents)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20
    return f"{len(latents)} pages, {size:.0f} MB, {time.monotonic() - begin:.0f} s: open {folder / 'index.html'}"
