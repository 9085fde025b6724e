"""The code on docs/recipes.md runs, in order and in a folder of its own, and says what it should."""

import importlib
import inspect
import re
from pathlib import Path

import make_api
import numpy as np
from conftest import random_clip_model, tiny_processor

from patchsae.world.pretrain import build_tokenizer

PAGE = Path(__file__).resolve().parents[2] / "docs" / "recipes.md"


def test_the_recipes(tmp_path, monkeypatch, capsys):
    tokenizer = build_tokenizer()
    random_clip_model(vocabulary=len(tokenizer)).save_pretrained(tmp_path / "my_clip")
    tokenizer.save_pretrained(tmp_path / "my_clip")
    tiny_processor().save_pretrained(tmp_path / "my_clip")
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (24, 20, 24, 3), np.uint8)
    names = {"my_images": images, "my_labels": np.arange(24) % 3}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(blocks) == 7
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    said = capsys.readouterr().out
    first, last = map(float, re.search(r"mse ([\d.]+) -> ([\d.]+)", said).groups())
    assert last < first and len(names["strongest"]) == 5
    assert names["heat"].shape == (2, 2) and names["shown"].shape == (16, 16, 3)
    assert set(names["table"]["mode"]) == {"original", "spliced", "on", "off"}
    assert not (names["before"] == names["after"]).all() and "difference of a latent: 0.0" in said


def test_the_api_page_is_what_the_docstrings_say():
    """``python tools/make_api.py`` writes it. Signatures look different under other versions of Python."""
    text = PAGE.with_name("api.md").read_text(encoding="utf-8")
    rooms = {name: importlib.import_module(f"patchsae.{name}") for name in make_api.ROOMS}
    things = [pair for room in rooms.values() for pair in make_api.public(room)]
    assert re.findall(r"^### `(\w+)", text, flags=re.MULTILINE) == [name for name, _ in things]
    assert all(inspect.getdoc(thing) in text for _, thing in things if inspect.getdoc(thing))
