"""``patchsae cache``: it asks before it writes, and verifies bytes, images and tokens."""

import re

import numpy as np
import pytest
from conftest import LAYER, one_sentence, random_clip_model, tiny_processor
from PIL import Image

from patchsae import ArrayDataset
from patchsae.__main__ import main
from patchsae.cache import open_cache, write_cache
from patchsae.clip import Clip
from patchsae.data.datasets import FolderDataset
from patchsae.project import caching
from patchsae.project.caching import verify_images


@pytest.fixture
def command(clip, pixel_data, tmp_path, monkeypatch, capsys):
    """``patchsae cache`` on tiny things; returns what it prints."""
    folder = tmp_path / "activations"
    monkeypatch.setattr(caching, "load_clip", lambda *_: clip)
    monkeypatch.setattr(caching, "open_dataset", lambda *_: pixel_data)
    monkeypatch.setattr(caching, "cache_folder", lambda *_: folder)
    monkeypatch.setattr(caching.processes, "join", lambda: None)

    def run(*arguments, answer=None):
        def respond(question):
            if answer is None:
                raise EOFError
            print(question, end="")
            return answer

        monkeypatch.setattr("builtins.input", respond)
        main(["cache", *arguments])
        return capsys.readouterr().out

    run.folder = folder
    return run


@pytest.mark.parametrize("answer", [None, "", "n", "no", "what?"])
def test_the_command_asks_first(command, answer):
    said = command(answer=answer)
    assert re.search(r"23 images after block 2 take 2.76e-06 GB as float16 in .*, where .* GB are free; 0 shards", said)
    assert "about 1 minutes on 1 process like" in said and said.rstrip().endswith("Nothing was written.")
    assert not command.folder.exists()


def test_the_command_writes_verifies_and_does_not_ask_again(command, clip, pixel_data):
    assert "holds the tokens of 23 images, 0 could not be read; float16 takes" in command(answer="y")
    assert "Write it?" not in command() and "as it was written (23 images)" in command("--verify")
    with pytest.raises(SystemExit, match="in float16 and not bfloat16"):
        command("--yes", "--dtype", "bfloat16")
    assert len(open_cache(command.folder, clip, pixel_data, LAYER)) == 23


def test_the_command_says_what_is_damaged(command):
    command("--yes", "--dtype", "bfloat16")
    path = command.folder / "shard-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x77")
    with pytest.raises(SystemExit, match="shard-00000.safetensors is damaged"):
        command("--verify")
    path.unlink()
    with pytest.raises(SystemExit, match="shard-00000.safetensors is missing"):
        command("--verify")
    assert "bfloat16 takes" in command("--yes", "--dtype", "bfloat16")


def test_verifying_compares_with_the_images_and_the_model(clip, pixel_data, tmp_path):
    cache = write_cache(clip, pixel_data, LAYER, tmp_path)
    verify_images(cache, clip, pixel_data)
    changed = pixel_data.pixels.clone()
    changed[8] += 1
    labels = (pixel_data.labels + (np.arange(23) == 22)) % 5
    other = Clip(random_clip_model(1), None, tiny_processor())
    for model, ds, words in ((clip, ArrayDataset(changed, pixel_data.labels), "position 8"),
                             (clip, ArrayDataset(pixel_data.pixels, labels), "position 22"),
                             (other, pixel_data, "other tokens of image")):
        with pytest.raises(ValueError, match=words) as error:
            verify_images(cache, model, ds)
        assert one_sentence(error.value) and str(tmp_path) in str(error.value)


def test_verifying_misses_no_image(clip, image_data, tmp_path):
    for i, image in enumerate(image_data.pixels):
        (tmp_path / "images" / "a").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "images" / "a" / f"{i:02}.png")
    ds = FolderDataset(tmp_path / "images")
    cache = write_cache(clip, ds, LAYER, tmp_path / "cache")
    verify_images(cache, clip, ds)
    ds.files[5][0].write_bytes(b"gone")
    with pytest.raises(ValueError, match="1 images .* Cannot read the image") as error:
        verify_images(cache, clip, ds)
    assert one_sentence(error.value)
