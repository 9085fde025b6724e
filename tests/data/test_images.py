"""Images in files: CLIP's own preprocessing, every kind of file, damage that is counted and does not stop a pass."""

import os
import pickle
import shutil
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from conftest import LAYER, SIDE, damaged, one_sentence, random_sae, refused
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from patchsae import ArrayDataset, collect_latents
from patchsae.activations import load_pixels, pixel_batches, token_batches
from patchsae.data.datasets import Subset
from patchsae.data.images import LONGEST, Crop, FileDataset, Unreadable, in_turn, read_image
from patchsae.data.reading import MOST_UNREADABLE
from patchsae.fast.pools import TrainingTokens


def photograph(height, width, seed=0) -> np.ndarray:
    """A smooth image with noise on it."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (max(2, height // 16 + 1), max(2, width // 16 + 1), 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.int16)
    return (smooth + rng.integers(-9, 10, smooth.shape)).clip(0, 255).astype(np.uint8)


# Preprocessing

SHAPES = [(224, 224), (375, 500), (500, 375), (224, 300), (1, 1), (7, 30), (640, 427), (1000, 225),
          (230, 1800), (50, 50)]
LONG = [(60, 540), (700, 80), (33, 600), (64, 640), (20_000, 3), (1, 20_000), (30, 20_000)]


def processed(image: np.ndarray) -> np.ndarray:
    """What CLIP's own processor makes of an image, before normalisation: uint8 ``[224, 224, 3]``."""
    processor = CLIPImageProcessorPil(do_rescale=False, do_normalize=False)
    return processor(images=[Image.fromarray(image)], return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)


@pytest.mark.parametrize("shape", SHAPES + LONG)
def test_crops_equal_clips_processor(shape):
    """Those of images much longer than wide almost; the longest take little memory."""
    image = photograph(*shape)
    found = Crop(224)(image)
    assert found.dtype == np.uint8 and found.shape == (224, 224, 3)
    if max(shape) <= LONGEST * min(shape):
        assert np.array_equal(found, processed(image))
    elif max(shape) < 1000:
        apart = np.abs(found.astype(int) - processed(image))
        assert (apart <= 1).mean() >= 0.999 and apart.max() <= 2


def test_pixels_equal_clips_processor_and_logits_equal_transformers(clip):
    images = [photograph(40, 60, seed) for seed in range(4)]
    size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    theirs = CLIPImageProcessorPil(**size)(images=[Image.fromarray(i) for i in images], return_tensors="pt")
    assert torch.equal(clip.pixels(images), theirs["pixel_values"])
    prompts = ["a photo of a cat.", "a photo of a dog."]
    words = clip.tokenizer(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = clip.model(input_ids=words["input_ids"], attention_mask=words["attention_mask"],
                              pixel_values=theirs["pixel_values"]).logits_per_image
        pixels = load_pixels(clip, ArrayDataset(images, [0] * 4), range(4)).pixels
        found = clip.logits(clip.above(clip.below(pixels, LAYER), LAYER), clip.text_features(prompts))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


# Kinds of files

def test_every_kind_of_file_is_read(tmp_path):
    image = Image.fromarray(photograph(30, 40))
    deep = np.linspace(0, 65535, 30 * 40).reshape(30, 40).astype(np.uint16)
    frames = [Image.fromarray(photograph(30, 40, k)) for k in range(3)]
    for mode, name in (("RGB", "a.jpg"), ("CMYK", "b.jpg"), ("P", "c.png"), ("1", "d.png"), ("RGBA", "e.webp")):
        image.convert(mode).save(tmp_path / name)
    for array, name in ((deep, "f.png"), (deep, "g.tif"), (deep.astype(np.float32), "h.tif")):
        Image.fromarray(array).save(tmp_path / name)
    for name in ("i.gif", "j.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    for path in sorted(tmp_path.iterdir()):
        found = read_image(path, path)
        assert found.shape == (30, 40, 3) and found.dtype == np.uint8, path.name
        assert np.array_equal(found, read_image(path.read_bytes(), path))
    for name in ("f.png", "g.tif"):  # 16 bits: the upper eight
        assert np.array_equal(read_image(tmp_path / name, name)[:, :, 0], deep >> 8)


def test_a_picture_whose_data_are_nonsense_is_not_a_black_one():
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", 10, 10, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"nonsense") + chunk(b"IEND", b"")
    with pytest.raises(Unreadable, match="nonsense.png"):
        read_image(data, "nonsense.png")


def test_pictures_with_holes_are_refused(tmp_path):
    grey = np.full((4, 4), 100, np.float32)
    for bad in (np.nan, np.inf):
        grey[1, 2] = bad
        Image.fromarray(grey).save(tmp_path / "a.tif")
        with pytest.raises(Unreadable, match="not finite") as error:
            read_image(tmp_path / "a.tif", "a.tif")
        assert one_sentence(error.value)


def test_five_hundred_damaged_images_are_one_sentence_or_an_image(tmp_path):
    numbers, forms = np.random.default_rng(0), ["jpg", "png", "webp", "gif", "tif", "bmp"]
    for form in forms:
        Image.fromarray(photograph(40, 50)).save(tmp_path / f"a.{form}")
    readable = 0
    for trial in range(500):
        bad = damaged((tmp_path / f"a.{forms[trial % len(forms)]}").read_bytes(), numbers, cut=trial % 5 == 0, flips=3)
        bad = numbers.bytes(len(bad)) if trial % 5 == 1 else bad
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = read_image(bad, f"damaged {trial}")
            assert found.dtype == np.uint8 and found.ndim == 3 and Crop(16)(found).shape == (16, 16, 3)
            readable += 1
        except Unreadable as error:
            assert one_sentence(error), error
    assert 50 < readable < 450


# A pass over files of which some cannot be read

def folder(tmp_path, n, bad=()) -> FileDataset:
    """Small images of two classes; those in ``bad`` are no images, one of them is missing."""
    tmp_path.mkdir(exist_ok=True)
    files = []
    for i in range(n):
        path = tmp_path / f"{i:04}.png"
        if i in bad:
            path.write_bytes(b"not an image") if i % 2 else None
        else:
            Image.fromarray(photograph(SIDE, SIDE + i % 3, i)).save(path)
        files.append((path, i % 2))
    return FileDataset(tmp_path, files, ("even", "odd"), SIDE)


def test_a_pass_goes_on_over_a_few_unreadable_images(tmp_path, clip, monkeypatch):
    monkeypatch.setattr("patchsae.data.reading.MOST_UNREADABLE", 0.1)
    bad = (3, 8)
    ds = folder(tmp_path, 40, bad)
    good = [i for i in range(40) if i not in bad]
    clean = ArrayDataset([ds[i].image for i in good], [i % 2 for i in good])
    sae = random_sae()
    found, expected = (collect_latents(clip, sae, d, LAYER, n_reference=12, batch_images=5) for d in (ds, clean))
    assert (found.n_images, found.n_unreadable, expected.n_unreadable) == (38, 2, 0)
    assert sorted(ds.unreadable) == [3, 8] and all("png" in reason for reason in ds.unreadable.values())
    for name in ("frequency", "class_counts", "reference_values"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-6)
    positions = torch.tensor([*good, -1])
    assert torch.equal(found.reference_rows, positions[expected.reference_rows])
    for row, name in zip(found.reference_rows[0].tolist(), found.reference_ids[0]):
        assert row < 0 or ds[row].id == name


def test_too_many_unreadable_images_are_one_sentence(tmp_path, clip):
    """One is tolerated, whatever the size of the data set; more only up to one in a thousand."""
    ds = folder(tmp_path, 40, bad=(5, 9))
    assert 2 / 40 > MOST_UNREADABLE
    with refused("2 of 40 images.*0005.png"):
        list(pixel_batches(clip, ds, 4))
    with pytest.raises(Unreadable):
        load_pixels(clip, ds, [4, 5])
    subset = torch.utils.data.Subset(ds, range(8))
    assert sum(len(batch.rows) for batch in pixel_batches(clip, subset, 4)) == 7


def test_workers_give_what_one_process_gives(tmp_path, clip, monkeypatch):
    ds = folder(tmp_path, 48)
    monkeypatch.setattr("patchsae.data.reading.os.cpu_count", lambda: 3)
    many = list(token_batches(clip, ds, LAYER, 4))
    monkeypatch.setattr("patchsae.data.reading.MOST_WORKERS", 0)
    one = list(token_batches(clip, ds, LAYER, 4))
    assert len(many) == len(one) == 12
    for a, b in zip(many, one):
        assert torch.equal(a.z, b.z) and a.ids == b.ids and np.array_equal(a.rows, b.rows)
        assert torch.equal(a.labels, b.labels)


def test_images_that_are_read_are_counted_where_it_is_asked_for(tmp_path, clip, monkeypatch):
    """In worker processes too, of parts as of the whole, and of counted data sets alone."""
    place, ds = tmp_path / "read", folder(tmp_path, 48)
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    list(token_batches(clip, ds, LAYER, 4))
    monkeypatch.setenv("PATCHSAE_READ", str(place))
    list(token_batches(clip, ds, LAYER, 4))
    assert not place.exists()
    ds.counted = True
    list(token_batches(clip, ds, LAYER, 4))
    load_pixels(clip, Subset(ds, range(len(ds.class_names)), [5, 3]), [0, 1, 1])
    counts = [line.split() for line in place.read_text().splitlines()]
    assert sum(int(n) for n, of in counts) == 48 + 3 and {of for n, of in counts} == {"48"} and len(counts) == 13


def test_training_leaves_unreadable_images_out(tmp_path, clip, monkeypatch):
    monkeypatch.setattr("patchsae.data.reading.MOST_UNREADABLE", 0.1)
    ds, rows = folder(tmp_path, 20, bad=(7,)), [np.array([1, 7, 3, 7]), np.array([4, 2])]
    kept = [z for z, in TrainingTokens(clip, ds, [LAYER]).batches(rows)]
    monkeypatch.setattr("patchsae.fast.pools.MEMORY", 0)
    computed = [z for z, in TrainingTokens(clip, ds, [LAYER]).batches(rows)]
    assert [len(z) for z in kept] == [len(z) for z in computed] == [2, 2]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(kept, computed))


# What a data set is known by

def test_a_data_set_is_known_by_what_its_files_hold(tmp_path):
    ds = folder(tmp_path / "one", 6)
    shutil.copytree(tmp_path / "one", tmp_path / "two", copy_function=shutil.copyfile)
    files = [(tmp_path / "two" / path.name, label) for path, label in ds.files]
    for i, (path, label) in enumerate(files):
        files[i] = path.rename(path.with_name(f"{9 - i} renamed.png")), label
        os.utime(files[i][0], (i, i))

    def fingerprint(files=files, names=ds.class_names, size=SIDE):
        return FileDataset(tmp_path / "two", files, names, size).fingerprint()

    assert fingerprint() == ds.fingerprint()
    relabelled, other = [(files[0][0], 1), *files[1:]], [*files[:5], (tmp_path / "two" / "none.png", 1)]
    different = {ds.fingerprint(), fingerprint(files[::-1]), fingerprint(files[:5]), fingerprint(relabelled),
                 fingerprint(names=("a", "b")), fingerprint(size=8), fingerprint(other)}
    assert len(different) == 7


def test_a_fingerprint_is_computed_once(tmp_path, monkeypatch):
    ds = folder(tmp_path, 3)
    first = ds.fingerprint()
    monkeypatch.setattr("patchsae.data.images.file_hashes", None)
    assert ds.fingerprint() == first and pickle.loads(pickle.dumps(ds)).fingerprint() == first


def test_in_turn():
    files = [("a", 1), ("b", 1), ("c", 0), ("d", 2), ("e", 0)]
    assert in_turn(files, None) == [("c", 0), ("a", 1), ("d", 2), ("e", 0), ("b", 1)]
    assert in_turn(files, 2) == [("c", 0), ("a", 1)]
