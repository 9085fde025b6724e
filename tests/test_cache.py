"""The disk cache of activations: the model's own tokens, whatever happened while they were written, or an error."""

import errno
import json
import multiprocessing
import os
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import LAYER, SIDE, one_sentence, random_clip_model, tiny_processor
from PIL import Image
from safetensors import safe_open
from tqdm.auto import tqdm

from patchsae import ArrayDataset, cache
from patchsae.cache import cache_bytes, cache_folder, open_cache, write_cache
from patchsae.clip import Clip
from patchsae.data.datasets import FolderDataset
from patchsae.data.images import LostWorker
from patchsae.fast.shards import DIFFERENT, Writer
from patchsae.maple import new_maple
from patchsae.weights.sealed import load_sealed, save_sealed

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from stress_cache import FAULTS, World, contents, is_continued, is_detected, sources  # noqa: E402

DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
IMAGE = 5 * 12 * 2  # bytes of an image's tokens
NAMES = [f"shard-0000{k}.safetensors" for k in range(6)]


def shards_of(images, monkeypatch):
    """Have shards of so many images."""
    monkeypatch.setattr(cache, "SHARD_BYTES", images * IMAGE)


@pytest.fixture(autouse=True)
def _shards_of_five(monkeypatch):
    """The 23 images of ``pixel_data`` are four whole shards and one of three."""
    shards_of(5, monkeypatch)


@pytest.fixture
def made(clip, pixel_data, tmp_path):
    """A cache in a folder of its own."""
    return write_cache(clip, pixel_data, LAYER, tmp_path / "cache", batch_images=2)


@torch.no_grad()
def tokens(clip, ds, layer=LAYER, dtype=torch.float16):
    """What a cache must hold, image by image."""
    pixels = torch.stack([torch.as_tensor(ds[i].image) for i in range(len(ds))])
    pixels = pixels if pixels.is_floating_point() else clip.pixels(pixels.numpy())
    return torch.cat([clip.below(image[None], layer)[:, :clip.n_tokens] for image in pixels]).to(dtype)


def refusal(kind, call, *words):
    """The sentence with which a call is refused, after a look for these words in it."""
    with pytest.raises(kind) as error:
        call()
    assert one_sentence(error.value) and all(word in str(error.value) for word in words), error.value
    return str(error.value)


# What is in it

@DTYPES
@pytest.mark.parametrize("layer", [0, LAYER])
def test_a_cache_holds_the_tokens_of_the_cut(clip, pixel_data, tmp_path, dtype, layer):
    held = write_cache(clip, pixel_data, layer, tmp_path / "c", dtype, batch_images=2)[range(23)]
    expected = tokens(clip, pixel_data, layer, dtype)
    assert held.dtype == dtype and held.shape == expected.shape
    # Another batch size may round the last bit of float32, and so now and then one of half precision.
    assert torch.allclose(held.float(), expected.float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    assert (held == expected).float().mean() > 0.999


def test_of_uint8_images_and_with_prompts(clip, image_data, tmp_path):
    adapted = new_maple(clip, image_data.class_names, n=2, depth=3, vision=True, seed=0)
    held = write_cache(adapted, image_data, LAYER, tmp_path / "c")
    assert held.shape == (5, 12) and torch.allclose(held[range(14)], tokens(adapted, image_data), rtol=2e-3, atol=1e-5)
    refusal(ValueError, lambda: open_cache(tmp_path / "c", clip, image_data, LAYER), "manifest.json", "another model")


def test_labels_and_ids_are_those_of_the_images(made, pixel_data):
    assert len(made) == 23 and made.rows.tolist() == [*range(23)]
    assert made.labels.tolist() == pixel_data.labels.tolist()
    assert made.ids == [pixel_data[i].id for i in range(23)]


@DTYPES
def test_the_cost_of_half_precision_is_that_of_its_definition(clip, pixel_data, tmp_path, dtype):
    held = write_cache(clip, pixel_data, LAYER, tmp_path / "c", dtype)
    with torch.no_grad():
        z = clip.below(pixel_data.pixels, LAYER).flatten(0, 1).double()
    lost = (z - held[range(23)].double().flatten(0, 1)).square().sum() / (z - z.mean(0)).square().sum()
    assert held.manifest["explained_variance_cost"] == pytest.approx(lost.item(), rel=1e-3)
    assert 0 < lost < 1e-4


def test_files_say_what_they_are(made, clip, pixel_data):
    manifest = json.loads((made.folder / "manifest.json").read_text())
    made_of = {"model": clip.fingerprint(), "block": 2, "images": pixel_data.fingerprint(), "dtype": "float16"}
    assert made_of.items() <= manifest["made_of"].items()
    assert [manifest[name] for name in ("format", "shape", "n_images", "unreadable")] == [2, [5, 12], 23, []]
    assert sorted(path.name for path in made.folder.iterdir()) == ["manifest.json", *NAMES[:5]]
    assert list(manifest["shards"]) == NAMES[:5]


def test_any_reader_of_safetensors_reads_a_shard(made):
    for name, rows in zip(NAMES, (range(0, 5), range(5, 10), range(10, 15), range(15, 20), range(20, 23))):
        with safe_open(made.folder / name, "pt") as file:
            z, notes = file.get_tensor("z"), json.loads(file.metadata()["notes"])
        assert torch.equal(z, made[rows]) and notes["ids"] == made.ids[rows.start:rows.stop]
        assert notes["crc32"][1] == zlib.crc32(z[1].numpy().tobytes())


# Reading

def test_rows_come_in_the_order_asked_for(made):
    rows, all_of_them = np.random.default_rng(0).integers(0, 23, 200), made[range(23)]
    assert torch.equal(made[rows], all_of_them[rows]) and torch.equal(made[torch.from_numpy(rows)], all_of_them[rows])
    assert made[[]].shape == (0, 5, 12)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_batches_are_the_same_whatever_the_number_of_threads(made, threads):
    rng, everything = np.random.default_rng(1), made[range(23)].clone()
    rows = [rng.integers(0, 23, rng.integers(1, 9)) for _ in range(60)]
    held = list(made.batches(iter(rows), threads=threads))
    assert all(torch.equal(z, everything[part]) for z, part in zip(held, rows)) and len(held) == 60


def test_memory_is_used_again_and_never_under_a_batch_that_is_in_use(made):
    kept, first = made[[3, 4]], made[[0, 1]]
    part, copy, places = first[1:, 2], first[1:, 2].clone(), set()
    del first
    for row in range(20):
        z = made[[row, row + 1]]
        places.add(z.data_ptr())
    # One batch is in use while the next is read.
    assert len(places) == 2 and torch.equal(part, copy) and torch.equal(kept, made[[3, 4]])


def test_reading_ahead_stops_with_who_reads(made):
    asked = []
    batches = made.batches((asked.append(i) or [i % 23] for i in range(10**6)), threads=2)
    next(batches)
    batches.close()
    assert len(asked) <= 5


@pytest.mark.parametrize("rows", [[23], [-1], [0, 99]])
def test_positions_outside_the_data_set(made, rows):
    refusal(IndexError, lambda: made[rows], "23 images")


# Images that cannot be read

@pytest.fixture
def many_files(tmp_path, monkeypatch):
    """24 image files in two classes, two of them damaged; more may be unreadable than usual."""
    monkeypatch.setattr("patchsae.data.reading.MOST_UNREADABLE", 0.5)
    for i in range(24):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(path)
        if i in (2, 7):
            path.write_bytes(path.read_bytes()[:60])
    return FolderDataset(tmp_path / "images")


@pytest.mark.parametrize("images", [1, 4, 100])
def test_images_that_cannot_be_read_are_left_out_and_named(clip, many_files, tmp_path, monkeypatch, images):
    shards_of(images, monkeypatch)
    held = write_cache(clip, many_files, LAYER, tmp_path / "c", batch_images=3)
    bad = [i for i, (path, _) in enumerate(many_files.files) if path.stem in ("02", "07")]
    assert held.manifest["unreadable"] == bad and len(held) == 22
    said = dict(pair for shard in held.shards for pair in shard.notes["unreadable"])
    assert sorted(said) == bad and all("Cannot read the image" in reason for reason in said.values())
    assert held[range(24)].shape == (22, 5, 12) and held[bad].shape == (0, 5, 12)
    with torch.no_grad():
        last = clip.below(clip.pixels(many_files[23].image), LAYER).half()
    assert torch.allclose(held[[bad[0], 23]], last, rtol=2e-3, atol=1e-5)
    assert held.ids[-1] == many_files[23].id
    held.verify()


def test_what_could_not_be_read_counts_again_when_writing_goes_on(clip, many_files, tmp_path, monkeypatch):
    shards_of(4, monkeypatch)
    whole = contents(write_cache(clip, many_files, LAYER, tmp_path / "c").folder)
    for name in ("manifest.json", NAMES[5]):
        (tmp_path / "c" / name).unlink()
    many_files.unreadable.clear()
    assert contents(write_cache(clip, many_files, LAYER, tmp_path / "c").folder) == whole
    assert len(many_files.unreadable) == 2
    (tmp_path / "c" / "manifest.json").unlink()
    monkeypatch.setattr("patchsae.data.reading.MOST_UNREADABLE", 0.01)
    refusal(ValueError, lambda: write_cache(clip, many_files, LAYER, tmp_path / "c"), "2 of 24")


# Going on

def test_an_interrupted_writing_goes_on_to_the_same_bytes(made, clip, pixel_data, monkeypatch):
    whole = contents(made.folder)
    for name in ("manifest.json", NAMES[2], NAMES[4]):
        (made.folder / name).unlink()
    (made.folder / NAMES[1]).write_bytes(whole[NAMES[1]][:-1])
    (made.folder / NAMES[3]).write_bytes(whole[NAMES[3]][:-1] + b"\0")
    (made.folder / f".{NAMES[3]}.1234.safetensors").write_bytes(b"half")
    computed = []
    below = clip.below
    monkeypatch.setattr(clip, "below", lambda pixels, layer: computed.append(len(pixels)) or below(pixels, layer))
    write_cache(clip, pixel_data, LAYER, made.folder, batch_images=2)
    assert contents(made.folder) == whole and sum(computed) == 18


def test_a_finished_cache_is_not_written_again(made, clip, pixel_data, monkeypatch):
    monkeypatch.setattr(clip, "below", None)
    assert len(write_cache(clip, pixel_data, LAYER, made.folder, most_bytes=0)) == 23


def test_a_removed_file_is_made_anew(made, clip, pixel_data):
    whole = contents(made.folder)
    for name in sorted(whole):
        (made.folder / name).unlink()
        write_cache(clip, pixel_data, LAYER, made.folder, batch_images=2)
        assert contents(made.folder) == whole, name


def test_another_cache_is_not_overwritten(made, clip, pixel_data, monkeypatch):
    whole = contents(made.folder)
    refusal(ValueError, lambda: write_cache(clip, pixel_data, LAYER, made.folder, torch.bfloat16),
            "in float16 and not bfloat16")
    refusal(ValueError, lambda: write_cache(clip, pixel_data, 0, made.folder), "after block 2 and not 0")
    assert contents(made.folder) == whole
    (made.folder / "manifest.json").unlink()
    refusal(ValueError, lambda: write_cache(clip, pixel_data, 0, made.folder), NAMES[0], "after block 2 and not 0")
    shards_of(7, monkeypatch)
    refusal(ValueError, lambda: write_cache(clip, pixel_data, LAYER, made.folder), "in shards of 5 images and not 7")
    whole.pop("manifest.json")
    assert contents(made.folder) == whole


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_a_random_moment(tmp_path, seed):
    source = sources(84)["own"]
    whole = contents(source.write(tmp_path / "whole"))
    assert is_continued(source, tmp_path / "killed", np.random.default_rng(seed).uniform(0.01, 0.15), whole)


def _one_of_two(rank, meeting, source, folder, after):
    """One process of two; the first one is killed after so many shards."""
    torch.set_num_threads(1)  # a forked process must not wait for threads or for a lock that it does not have
    tqdm.set_lock(threading.RLock())
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    written = []
    write_shard = Writer._write_shard

    def counted(writer, k, batches):
        write_shard(writer, k, batches)
        written.append(k)
        if rank == 0 and len(written) == after:
            os._exit(9)

    Writer._write_shard = counted
    try:
        source.write(folder)
        (folder.parent / f"written by {rank}").write_text(json.dumps(written))
    except LostWorker as error:
        (folder.parent / "said").write_text(str(error))
        os._exit(1)


def two_processes(folder, source, after=None):
    """Write a cache with two processes; their exit codes."""
    (folder / "meeting").unlink(missing_ok=True)
    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=_one_of_two, args=(rank, folder / "meeting", source, folder / "cache", after))
            for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    return [process.exitcode for process in both]


def test_two_processes_write_what_one_does(tmp_path):
    source = sources(24)["own"]
    assert two_processes(tmp_path, source) == [0, 0]
    assert contents(tmp_path / "cache") == contents(source.write(tmp_path / "one"))
    assert [json.loads((tmp_path / f"written by {rank}").read_text()) for rank in range(2)] == [[0, 1], [2, 3]]


def test_a_lost_process_is_one_sentence_and_the_rest_goes_on(tmp_path):
    source = sources(24)["own"]
    assert two_processes(tmp_path, source, after=1) == [9, 1]
    said = (tmp_path / "said").read_text()
    assert "was lost" in said and "\n" not in said and not (tmp_path / "cache" / "manifest.json").exists()
    assert two_processes(tmp_path, source) == [0, 0]
    assert [json.loads((tmp_path / f"written by {rank}").read_text()) for rank in range(2)] == [[1], []]
    assert contents(tmp_path / "cache") == contents(source.write(tmp_path / "one"))


class _Doomed(FolderDataset):
    """A data set that ends the process which reads it."""

    def __getitem__(self, i):
        if i == 17:
            os._exit(1)
        return super().__getitem__(i)


def test_a_lost_reading_worker_is_one_sentence(clip, many_files, tmp_path):
    doomed = _Doomed(many_files.root)
    text = refusal(LostWorker, lambda: write_cache(clip, doomed, LAYER, tmp_path / "c", batch_images=2), "was lost")
    assert "run again" in text and not [path for path in (tmp_path / "c").iterdir() if path.name[0] == "."]
    write_cache(clip, many_files, LAYER, tmp_path / "c", batch_images=2).verify()


# Disks

def test_a_full_disk_leaves_nothing_half_written(clip, pixel_data, tmp_path, monkeypatch):
    folder, replace = tmp_path / "c", os.replace

    def full(temporary, path):
        if Path(path).name == NAMES[2]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(temporary, path)

    def write():
        return write_cache(clip, pixel_data, LAYER, folder, batch_images=2)

    monkeypatch.setattr(os, "replace", full)
    refusal(OSError, write, NAMES[2], "No space left", "free space")
    assert sorted(contents(folder)) == NAMES[:2]
    monkeypatch.setattr(os, "replace", replace)
    other = write_cache(clip, pixel_data, LAYER, tmp_path / "d", batch_images=2)
    assert contents(write().folder) == contents(other.folder)


def test_a_folder_that_cannot_be_written(clip, pixel_data, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    refusal(OSError, lambda: write_cache(clip, pixel_data, LAYER, tmp_path / "file" / "c"), "Cannot write")
    assert (tmp_path / "file").read_text() == "not a folder"


def test_a_cache_that_is_too_large_is_refused_before_anything_is_written(clip, pixel_data, tmp_path, monkeypatch):
    folder, size = tmp_path / "a" / "b", cache_bytes(clip, 23)
    assert size == 23 * IMAGE

    def write(**settings):
        return write_cache(clip, pixel_data, LAYER, folder, **settings)

    refusal(ValueError, lambda: write(most_bytes=size - 1), f"most_bytes={size}", "make cache", str(folder))
    monkeypatch.setattr(cache, "free_bytes", lambda folder: size - 1)
    refusal(OSError, write, "are free", "choose another folder")
    assert not folder.parent.exists()
    monkeypatch.setattr(cache, "free_bytes", lambda folder: size)
    assert len(write(most_bytes=size)) == 23


def test_room_is_asked_for_what_is_missing_only(made, clip, pixel_data, monkeypatch):
    for name in ("manifest.json", NAMES[4]):
        (made.folder / name).unlink()
    monkeypatch.setattr(cache, "free_bytes", lambda folder: 3 * IMAGE)
    assert len(write_cache(clip, pixel_data, LAYER, made.folder)) == 23


def test_size_of_imagenet():
    vit = type("ViT", (), {"n_tokens": 197, "width": 768, "below": None, "above": None})
    assert cache.gigabytes(cache_bytes(vit, 1_281_167)) == "388 GB"


# Damage

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A cache and others that could be taken for it."""
    return World(tmp_path_factory.mktemp("world"), 24, 0)


@pytest.mark.parametrize("fault", FAULTS)
def test_damage_is_refused_with_the_name_of_the_file(world, fault, tmp_path):
    assert all(is_detected(world, fault, tmp_path / "copy") for _ in range(3))


@pytest.mark.parametrize("name", ["model", "block", "preprocessing", "images"])
def test_it_is_said_what_differs(world, name):
    said = refusal(ValueError, lambda: world.sources["own"].open(world.folders[name]), "manifest.json")
    assert [part for part, how in DIFFERENT.items() if how.format(0, 2) in said] == [name]


def test_there_is_no_cache_without_a_manifest(clip, pixel_data, tmp_path):
    said = ("manifest.json", "no finished cache", "make cache")
    refusal(FileNotFoundError, lambda: open_cache(tmp_path), *said)


def test_a_cache_of_a_later_format(made, clip, pixel_data):
    path = made.folder / "manifest.json"
    save_sealed(path, load_sealed(path) | {"format": 3})
    refusal(ValueError, lambda: open_cache(made.folder), "format 3")


def test_a_cache_is_checked_against_what_is_given(made, clip, pixel_data, image_data):
    other = Clip(random_clip_model(1), None, tiny_processor())
    for given in ({"clip": clip}, {"ds": pixel_data}, {"clip": clip, "layer": 2},
                  {"clip": clip, "ds": pixel_data, "layer": -2}):
        assert torch.equal(open_cache(made.folder, **given)[[4]], made[[4]])
    refusal(ValueError, lambda: open_cache(made.folder, clip=other), "another model")
    refusal(ValueError, lambda: open_cache(made.folder, clip, layer=0), "after block 2 and not 0")
    refusal(ValueError, lambda: open_cache(made.folder, ds=image_data), "other images")
    refusal(ValueError, lambda: open_cache(made.folder, layer=2), "together with the layer")


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("fault", ["flip", "truncate", "remove"])
def test_damage_after_opening_is_seen_when_reading(made, fault, used):
    path = made.folder / NAMES[3]
    if used:
        made[[15]]
    place = path.stat().st_size - 3 * IMAGE + 7  # in image 17
    if fault == "flip":
        with open(path, "r+b") as file:
            file.seek(place)
            file.write(bytes([path.read_bytes()[place] ^ 1]))
    elif fault == "truncate":
        os.truncate(path, place)
    else:
        path.unlink()
    assert made[range(15)].shape == (15, 5, 12)
    refusal((ValueError, FileNotFoundError), lambda: made[[0, 17]], str(path))
    refusal((ValueError, FileNotFoundError), lambda: list(made.batches([[1], [17], [2]])), str(path))


def test_verify_reads_everything(made):
    made.verify()
    path = made.folder / NAMES[4]
    path.write_bytes(path.read_bytes()[:-1] + b"\x77")
    refusal(ValueError, made.verify, str(path), "damaged")


# What half precision cannot hold

def test_values_too_large_for_float16(clip, pixel_data, tmp_path, monkeypatch):
    below = clip.below
    monkeypatch.setattr(clip, "below", lambda pixels, layer: below(pixels, layer) * 1e5)
    refusal(ValueError, lambda: write_cache(clip, pixel_data, LAYER, tmp_path / "c"), "position 0", "choose bfloat16")
    assert not (tmp_path / "c").exists()
    held = write_cache(clip, pixel_data, LAYER, tmp_path / "c", torch.bfloat16)
    assert held[range(23)].isfinite().all() and held[range(23)].abs().max() > 65504


def test_tokens_that_are_not_finite(clip, pixel_data, tmp_path):
    pixels = pixel_data.pixels.clone()
    pixels[6, 0, 0, 0] = torch.nan
    refusal(ValueError, lambda: write_cache(clip, ArrayDataset(pixels, pixel_data.labels), LAYER, tmp_path / "c"),
            "position 6", "not finite")


def test_arguments_that_make_no_cache(clip, pixel_data, tmp_path):
    refusal(ValueError, lambda: write_cache(clip, pixel_data, LAYER, tmp_path, torch.float32), "float32")
    empty = ArrayDataset(pixel_data.pixels[:0], [])
    refusal(ValueError, lambda: write_cache(clip, empty, LAYER, tmp_path), "empty")


# Where it goes

def test_the_folder_depends_on_everything_a_cache_is_made_of(profile, clip, pixel_data, image_data):
    first = cache_folder(profile, clip, pixel_data)
    assert first == cache_folder(profile, clip, pixel_data) and first.parent == profile.run_dir / "activations"
    others = [cache_folder(profile.at_layer(0), clip, pixel_data), cache_folder(profile, clip, image_data),
              cache_folder(profile, Clip(random_clip_model(1), None, tiny_processor()), pixel_data),
              cache_folder(profile, Clip(clip.model), pixel_data)]
    assert len({first, *others}) == 5 and cache_folder(profile.at_layer(2), clip, pixel_data) == first
