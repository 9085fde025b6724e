"""The benchmarks in miniature: every side runs, both sides of each comparison agree, the table is what was found."""

import sys
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import bench
import bench_plain
import bench_table

SIZE = bench.Size(images=24, batch=9, steps=2, width=64, blocks=3, side=64, text_width=64, vocabulary=20, latents=1024,
                  classes=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Everything run once, on the CPU."""
    folder = tmp_path_factory.mktemp("bench")
    bench.build(folder, SIZE, "cpu")
    for side in bench.SIDES:
        bench.run_side(side, folder, SIZE, "cpu")
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return {side: bench.found_by(side, folder) for side in bench.SIDES}


def test_both_sides_agree(folder):
    assert bench.compare(folder, bench.SIDES) == []


def test_two_autoencoders_in_one_pass_take_the_steps_of_one(found):
    assert found["from-images-two"]["losses"] == found["from-images-ours"]["losses"]
    lines = bench_table.lines(found, asdict(SIZE)).splitlines()
    cost, = [float(line.split()[2]) for line in lines if line.startswith("BENCH two-in-one-pass")]
    ratio, = [float(line.split()[2]) for line in lines if line.startswith("RATIO one-pass")]
    assert cost * ratio == pytest.approx(2, rel=0.02)


def test_the_autoencoder_is_as_sparse_as_announced(folder):
    x = bench.read(folder, SIZE, "cpu")
    h = x.sae.encode(x.tokens()).detach()
    dead = x.quiet > bench.DEAD_AFTER
    assert 0.01 < dead.float().mean() < 0.04 and not (h[..., dead] > 0).any()
    assert (h > 0).flatten(0, 1).any(0)[~dead].all()
    pre = x.sae.pre_activations(x.tokens()).detach()[..., dead]
    assert pre.max() < 0 and pre.max() > -30, "ghost gradients go through exp of these"


def test_ghost_gradients_count(folder):
    x = bench.read(folder, SIZE, "cpu")
    found = bench_plain.PlainSae(x.sae)(x.tokens(), x.quiet > bench.DEAD_AFTER)
    assert found["ghost"] > 0 and found["ghost"] <= found["mse"] * (1 + 1e-5)


@pytest.mark.parametrize("name, change", [
    ("class_counts", lambda t: t + 1), ("frequency", lambda t: t * 0.5), ("mean_activation", lambda t: t * 1.01),
    ("rows", lambda t: t.flip(1))])
def test_statistics_that_differ_are_noticed(found, name, change):
    ours = found["statistics-ours"]
    assert bench.statistics_differ(ours | {name: change(ours[name])}, found["statistics-plain"])


def test_losses_and_tokens_that_differ_are_noticed(found):
    step, tower = found["sae-step-ours"], found["tower-ours"]
    assert bench.losses_differ(step | {"losses": [x * 1.001 for x in step["losses"]]}, found["sae-step-plain"])
    assert bench.tokens_differ(tower | {"z": tower["z"] * 1.01}, found["tower-plain"])


def test_lines_and_table(found):
    text, table = bench_table.lines(found, asdict(SIZE)), bench_table.rows(found, asdict(SIZE), "cpu")
    for name in ("statistics", "sae-step", "tower", "from-images"):
        assert f"\nRATIO {name} " in text and f"BENCH {name}-ours " in text and f"BENCH {name}-plain " in text
    for line in text.splitlines():
        assert line.startswith(("BENCH ", "RATIO ")) and len(line.split()) >= 4 or "-loss" in line
    assert len(table) == 4 and (table["times faster"] > 0).all() and (table["share of the machine"] > 0).all()
    shown = bench_table.markdown(table).splitlines()
    assert len(shown) == 6 and len({line.count("|") for line in shown}) == 1


def test_page_is_rewritten_between_its_markers(tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "performance.md"
    page.write_text("before\n<!-- cpu -->\nold\n<!-- end of cpu -->\nafter\n")
    monkeypatch.setattr(bench_table, "ROOT", tmp_path)
    bench_table.write(pd.DataFrame({"row": ["a"], "ours": [1234.5]}), "cpu", 2, docs=True)
    text = page.read_text()
    assert text.startswith("before\n<!-- cpu -->\n") and text.endswith("<!-- end of cpu -->\nafter\n")
    assert "old" not in text and "| a | 1,234 |" in text and (tmp_path / "data" / "bench" / "cpu.csv").is_file()
    with pytest.raises(ValueError, match="markers of cuda"):
        bench_table.between(text, "cuda", "")


def test_committed_page_has_the_markers():
    page = (bench_table.ROOT / "docs" / "performance.md").read_text()
    for name in ("cpu", "cuda"):
        assert bench_table.between(page, name, "x") != page


def test_a_library_that_is_not_there_is_said(folder, monkeypatch):
    def absent(x, device):
        bench.installed("overcomplete_is_not_there")

    monkeypatch.setitem(bench.SIDES, "sae-step-overcomplete", absent)
    bench.run_side("sae-step-overcomplete", folder, SIZE, "cpu")
    said = bench_table.lines({"sae-step-overcomplete": bench.found_by("sae-step-overcomplete", folder)}, asdict(SIZE))
    assert said == "BENCH sae-step-overcomplete - not installed (No module named 'overcomplete_is_not_there')"


def test_oneDNN_agrees_with_float64():
    numbers = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(*shape, generator=numbers) for shape in ((30, 768), (50, 768), (50,)))
    exact = x.double() @ w.double().T + b.double()
    with torch.no_grad(), bench.onednn.Linears():
        found = torch.nn.functional.linear(x, w, b)
    assert (found - exact).abs().max() < 1e-4
    assert (bench.onednn.linear(x, w, b, relu=True) - exact.relu()).abs().max() < 1e-4
