"""The dashboard's files: complete, self-contained, and true to the statistics."""

import base64
import errno
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import WIDTH, one_sentence, random_sae
from pets import N, Pets
from PIL import Image

from patchsae import ArrayDataset
from patchsae.app.dashboard import chosen_latents, neighbours, reference_pass, write_dashboard
from patchsae.app.explorer import Explorer


@pytest.fixture
def explorer(clip, image_data, tmp_path, monkeypatch):
    monkeypatch.setattr("patchsae.config.ROOT", tmp_path)
    sae = random_sae(WIDTH, N)
    sae.b_enc.data[7] = -1e3
    names = ("cat", "<b>dog</b>", "pig & co")
    ds = ArrayDataset(image_data.pixels, image_data.labels, class_names=names)
    return Explorer(Pets(clip, ds, sae=sae))


@pytest.fixture
def site(explorer, tmp_path):
    write_dashboard(explorer, tmp_path / "dashboard", "pets", range(N))
    return tmp_path / "dashboard"


def test_every_link_and_file_is_there_and_none_is_elsewhere(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) == N + 1
    for page in pages:
        text = page.read_text()
        assert "http" not in text.replace("http-equiv", "")
        targets = re.findall(r'(?:href|src|data-strip)="([^"]+)"', text) + re.findall(r"url\(([^)]+)\)", text)
        assert targets and all((page.parent / target).is_file() for target in targets)


def test_index_has_every_latent_with_its_numbers(site, explorer):
    rows = json.loads((site / "latents.js").read_text().removeprefix("const LATENTS = ").rstrip(";\n"))
    assert [row[0] for row in rows] == list(range(N)) and [row[1] for row in rows] == explorer.names
    assert np.allclose([row[4] for row in rows], explorer.stats.frequency, atol=1e-4)
    assert rows[7][1] == "never fires" and rows[7][5] is None and rows[7][7] is None


def test_pages_say_what_the_statistics_say_and_escape_it(site, explorer):
    latent = int(explorer.n_references.argmax())
    text = (site / "latents" / f"{latent}.html").read_text()
    assert f"{explorer.stats.frequency[latent]:.1%}" in text and "<b>dog</b>" not in text
    assert "fires on no image" in (site / "latents" / "7.html").read_text()


def test_masks_are_the_soft_masks_of_the_reference_images(explorer, site):
    latent = int(explorer.n_references.argmax())
    text = (site / "latents" / f"{latent}.html").read_text()
    shares = np.frombuffer(base64.b64decode(re.search(r'data-mask="([^"]*)"', text)[1]), np.uint8)
    images, heats, _ = explorer.reference_views(latent)
    low, high = (getattr(heats, f)((1, 2), keepdims=True) for f in ("min", "max"))
    assert np.abs(shares.reshape(-1, 2, 2)[:len(heats)] / 255 - (heats - low) / (high - low)).max() <= 0.5 / 255 + 1e-4
    strip = np.asarray(Image.open(site / "strips" / f"{latent}.jpg"))
    assert strip.shape == (16, 16 * len(images), 3)
    assert abs(strip[:, :16].astype(float).mean() - images[0].mean()) < 4


def test_one_pass_in_small_batches_is_the_same(explorer):
    for batch in (1, 5):
        small, masks = reference_pass(explorer, range(N), batch)
        whole = reference_pass(explorer, range(N))
        assert small.keys() == whole[0].keys() and (masks == whole[1]).all()


def test_neighbours_are_the_nearest_of_those_shown(explorer):
    latents = [1, 4, 5, 9, 12]
    rows = torch.nn.functional.normalize(explorer.sae.W_dec.detach(), dim=1)
    for own, near in zip(latents, neighbours(explorer, latents)):
        expected = sorted((s for s in latents if s != own), key=lambda s: -float(rows[own] @ rows[s]))
        assert [s for s, _, _ in near] == expected


def test_subsets_are_read_or_refused(explorer, monkeypatch):
    assert chosen_latents(explorer) == list(range(N))
    assert chosen_latents(explorer, "0-3, 9,2") == [0, 1, 2, 3, 9]
    for wrong in ("0-20", "3-1", "all", "1..4", "-3", "0-999999999", "7" * 5000):
        with pytest.raises(ValueError, match="LATENTS") as error:
            chosen_latents(explorer, wrong)
        assert one_sentence(error.value)
    monkeypatch.setattr("patchsae.app.dashboard.MOST", 5)
    entropy = explorer.stats.label_entropy.nan_to_num(torch.inf)
    chosen = chosen_latents(explorer)
    rest = [s for s in range(N) if s not in chosen]
    assert len(chosen) == 5 and entropy[chosen].max() <= entropy[rest].min()


def test_writing_again_replaces_everything(explorer, site):
    (site / "latents" / "old.html").write_text("from before")
    write_dashboard(explorer, site, "pets", [3, 5])
    assert sorted(p.name for p in (site / "latents").iterdir()) == ["3.html", "5.html"]
    assert [p.name for p in site.parent.iterdir() if p.name.startswith(".dashboard")] == []


def test_a_full_disk_leaves_the_old_pages_and_nothing_else(explorer, site, monkeypatch):
    before = {path: path.read_bytes() for path in site.rglob("*") if path.is_file()}

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "x")

    monkeypatch.setattr("patchsae.app.dashboard._write_index", full)
    with pytest.raises(OSError, match="No space left on device; free space") as error:
        write_dashboard(explorer, site, "pets", [3, 5])
    assert one_sentence(error.value)
    assert {path: path.read_bytes() for path in site.rglob("*") if path.is_file()} == before
    assert list(site.parent.glob(".dashboard*")) == []


def test_two_at_once_both_end_well_and_what_was_left_goes(explorer, tmp_path):
    left = tmp_path / ".dashboard.killed"
    left.mkdir()
    os.utime(left, (0, 0))
    with ThreadPoolExecutor(4) as pool:
        chosen = [[1, 2], [3, 4], [5], [6, 7, 8]]
        list(pool.map(lambda latents: write_dashboard(explorer, tmp_path / "dashboard", "pets", latents), chosen * 2))
    pages = sorted(int(path.stem) for path in (tmp_path / "dashboard" / "latents").iterdir())
    index = (tmp_path / "dashboard" / "latents.js").read_text()
    rows = json.loads(index.removeprefix("const LATENTS = ").rstrip(";\n"))
    assert pages in chosen and pages == [row[0] for row in rows]
    assert list(tmp_path.glob(".dashboard*")) == []
