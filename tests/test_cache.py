"""The disk cache of activations: the model's own tokens, whatever happened while they were written, or an error."""

import errno
import json
import multiprocessing
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import LAYER, SIDE, one_sentence, random_clip_model, tiny_processor
from PIL import Image

from patchsae import ArrayDataset, cache, shards
from patchsae.cache import cache_bytes, cache_folder, write_cache
from patchsae.clip import Clip
from patchsae.data.datasets import FolderDataset
from patchsae.maple import new_maple
from patchsae.shards import Cache, load_sealed, open_cache, save_sealed

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from stress_cache import FAULTS, World, contents, is_continued, is_detected, sources  # noqa: E402

DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
SHARD = 5  # images; the 23 of ``pixel_data`` are four whole shards and one of three


@pytest.fixture(autouse=True)
def _files_as_they_are(monkeypatch):
    """Waiting for a disk proves nothing here."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture
def made(clip, pixel_data, tmp_path):
    """A cache in a folder of its own."""
    return write_cache(clip, pixel_data, LAYER, tmp_path / "cache", shard_images=SHARD, batch_images=2)


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
    held = write_cache(clip, pixel_data, layer, tmp_path / "c", dtype, SHARD, batch_images=2)[range(23)]
    expected = tokens(clip, pixel_data, layer, dtype)
    assert held.dtype == dtype and held.shape == expected.shape
    # Another batch size may round the last bit of float32, and so now and then one of half precision.
    assert torch.allclose(held.float(), expected.float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    assert (held == expected).float().mean() > 0.999


def test_of_uint8_images_and_with_prompts(clip, image_data, tmp_path):
    adapted = new_maple(clip, image_data.class_names, n=2, depth=3, vision=True, seed=0)
    held = write_cache(adapted, image_data, LAYER, tmp_path / "c", shard_images=SHARD)
    assert held.shape == (5, 12) and torch.allclose(held[range(14)], tokens(adapted, image_data), rtol=2e-3, atol=1e-5)
    refusal(ValueError, lambda: open_cache(clip, image_data, LAYER, tmp_path / "c"), "manifest.json", "another model")


def test_labels_and_ids_are_those_of_the_images(made, pixel_data):
    assert len(made) == 23 and made.rows.tolist() == [*range(23)]
    assert made.labels.tolist() == pixel_data.labels.tolist()
    assert made.ids == [pixel_data[i].id for i in range(23)]


@DTYPES
def test_the_cost_of_half_precision_is_that_of_its_definition(clip, pixel_data, tmp_path, dtype):
    held = write_cache(clip, pixel_data, LAYER, tmp_path / "c", dtype, SHARD)
    with torch.no_grad():
        z = clip.below(pixel_data.pixels, LAYER).flatten(0, 1).double()
    lost = (z - held[range(23)].double().flatten(0, 1)).square().sum() / (z - z.mean(0)).square().sum()
    assert held.manifest["explained_variance_cost"] == pytest.approx(lost.item(), rel=1e-3)
    one = load_sealed(tmp_path / "c" / "shard-00004.json")["explained_variance_cost"]
    z = z[-15:]
    lost = (z - held[range(20, 23)].double().flatten(0, 1)).square().sum() / (z - z.mean(0)).square().sum()
    assert one == pytest.approx(lost.item(), rel=1e-3) and 0 < one < 1e-4


def test_files_say_what_they_are(made, clip, pixel_data):
    manifest = json.loads((made.folder / "manifest.json").read_text())
    assert manifest["parts"] == {"model": clip.fingerprint(), "block": 2, "images": pixel_data.fingerprint(),
                                 "preprocessing": manifest["parts"]["preprocessing"]}
    assert [manifest[name] for name in ("dtype", "shape", "rows", "n_unreadable")] == ["float16", [5, 12], 23, 0]
    sizes = [path.stat().st_size for path in sorted(made.folder.glob("*.bin"))]
    assert sizes == [5 * 120] * 4 + [3 * 120] and sum(sizes) == cache_bytes(clip, 23)
    first = (made.folder / "shard-00000.bin").read_bytes()
    assert first == made[range(5)].numpy().astype("<f2").tobytes()
    assert load_sealed(made.folder / "shard-00000.json")["crc32"][1] == zlib.crc32(first[120:240])


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
    monkeypatch.setattr("patchsae.activations.MOST_UNREADABLE", 0.5)
    monkeypatch.setattr(cache, "MOST_UNREADABLE", 0.5)
    for i in range(24):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(path)
        if i in (2, 7):
            path.write_bytes(path.read_bytes()[:60])
    return FolderDataset(tmp_path / "images")


@pytest.mark.parametrize("shard", [1, 4, 100])
def test_images_that_cannot_be_read_are_left_out_and_named(clip, many_files, tmp_path, shard):
    held = write_cache(clip, many_files, LAYER, tmp_path / "c", shard_images=shard, batch_images=3)
    bad = [i for i, (path, _) in enumerate(many_files.files) if path.stem in ("02", "07")]
    assert held.manifest["unreadable"] == bad and held.manifest["n_unreadable"] == 2 and len(held) == 22
    said = {k: v for path in (tmp_path / "c").glob("shard-*.json") for k, v in load_sealed(path)["unreadable"].items()}
    assert sorted(map(int, said)) == bad and all("Cannot read the image" in reason for reason in said.values())
    assert held[range(24)].shape == (22, 5, 12) and held[bad].shape == (0, 5, 12)
    with torch.no_grad():
        last = clip.below(clip.pixels(many_files[23].image), LAYER).half()
    assert torch.allclose(held[[bad[0], 23]], last, rtol=2e-3, atol=1e-5)
    assert held.ids[-1] == many_files[23].id
    held.verify(clip, many_files)


def test_what_could_not_be_read_counts_again_when_writing_goes_on(clip, many_files, tmp_path, monkeypatch):
    whole = contents(write_cache(clip, many_files, LAYER, tmp_path / "c", shard_images=4).folder)
    for name in ("manifest.json", "shard-00005.bin"):
        (tmp_path / "c" / name).unlink()
    many_files.unreadable.clear()
    assert contents(write_cache(clip, many_files, LAYER, tmp_path / "c", shard_images=4).folder) == whole
    assert len(many_files.unreadable) == 2
    (tmp_path / "c" / "manifest.json").unlink()
    monkeypatch.setattr(cache, "MOST_UNREADABLE", 0.01)
    refusal(ValueError, lambda: write_cache(clip, many_files, LAYER, tmp_path / "c", shard_images=4), "2 of 24")


# Going on

def test_an_interrupted_writing_goes_on_to_the_same_bytes(made, clip, pixel_data, monkeypatch):
    whole = contents(made.folder)
    for name in ("manifest.json", "shard-00002.json", "shard-00003.bin", "shard-00004.bin"):
        (made.folder / name).unlink()
    (made.folder / "shard-00001.bin").write_bytes(whole["shard-00001.bin"][:-1])
    nobody = subprocess.Popen([sys.executable, "-c", ""])
    nobody.wait()
    (made.folder / f".shard-00003.bin.{nobody.pid}.bin").write_bytes(b"half")
    computed = []
    below = clip.below
    monkeypatch.setattr(clip, "below", lambda pixels, layer: computed.append(len(pixels)) or below(pixels, layer))
    write_cache(clip, pixel_data, LAYER, made.folder, shard_images=SHARD, batch_images=2)
    assert contents(made.folder) == whole and sum(computed) == 18


def test_what_another_process_is_writing_is_left_alone(made, clip, pixel_data):
    (made.folder / "manifest.json").unlink()
    other = made.folder / f".shard-00003.bin.{os.getppid()}.bin"
    other.write_bytes(b"half")
    write_cache(clip, pixel_data, LAYER, made.folder, shard_images=SHARD)
    assert other.read_bytes() == b"half"


def test_a_finished_cache_is_not_written_again(made, clip, pixel_data, monkeypatch):
    monkeypatch.setattr(clip, "below", None)
    assert len(write_cache(clip, pixel_data, LAYER, made.folder, most_bytes=0)) == 23


def test_a_removed_file_is_made_anew(made, clip, pixel_data):
    whole = contents(made.folder)
    for name in sorted(whole):
        (made.folder / name).unlink()
        write_cache(clip, pixel_data, LAYER, made.folder, shard_images=SHARD, batch_images=2)
        assert contents(made.folder) == whole, name


def test_another_cache_is_not_overwritten(made, clip, pixel_data):
    whole = contents(made.folder)
    refusal(ValueError, lambda: write_cache(clip, pixel_data, LAYER, made.folder, torch.bfloat16), "float16", "dtype")
    refusal(ValueError, lambda: write_cache(clip, pixel_data, 0, made.folder), "at another block")
    assert contents(made.folder) == whole
    (made.folder / "manifest.json").unlink()
    refusal(ValueError, lambda: write_cache(clip, pixel_data, 0, made.folder), "shard-00000.json", "key")
    refusal(ValueError, lambda: write_cache(clip, pixel_data, LAYER, made.folder, shard_images=7), "shard_images 5")


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_a_random_moment(tmp_path, seed):
    source = sources(84)["own"]
    whole = contents(source.write(tmp_path / "whole"))
    assert is_continued(source, tmp_path / "killed", np.random.default_rng(seed).uniform(0.01, 0.15), whole)


def _one_of_two(rank, meeting, source, folder, after):
    """One process of two; the first one is killed after so many shards."""
    torch.set_num_threads(1)  # a forked process must not wait for threads that it does not have
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    written = []
    write_shard = cache._Writer._write_shard

    def counted(writer, k, batches):
        write_shard(writer, k, batches)
        written.append(k)
        if rank == 0 and len(written) == after:
            os._exit(9)

    cache._Writer._write_shard = counted
    try:
        source.write(folder)
        (folder.parent / f"written by {rank}").write_text(json.dumps(written))
    except ChildProcessError as error:
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
    assert [json.loads((tmp_path / f"written by {rank}").read_text()) for rank in range(2)] == [[], [1]]
    assert contents(tmp_path / "cache") == contents(source.write(tmp_path / "one"))


class _Doomed(FolderDataset):
    """A data set that ends the process which reads it."""

    def __getitem__(self, i):
        if i == 17:
            os._exit(1)
        return super().__getitem__(i)


def test_a_lost_reading_worker_is_one_sentence(clip, many_files, tmp_path):
    doomed = _Doomed(many_files.root)
    text = refusal(ChildProcessError, lambda: write_cache(clip, doomed, LAYER, tmp_path / "c", shard_images=4,
                                                          batch_images=2), "was lost", "are kept")
    assert "run again" in text and not [path for path in (tmp_path / "c").iterdir() if path.name[0] == "."]
    write_cache(clip, many_files, LAYER, tmp_path / "c", shard_images=4, batch_images=2).verify(clip, many_files)


# Disks

def test_a_full_disk_leaves_nothing_half_written(clip, pixel_data, tmp_path, monkeypatch):
    def full(batch, z, dtype):
        if batch.rows[0] == 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return half(batch, z, dtype)

    half = cache._half
    monkeypatch.setattr(cache, "_half", full)
    folder = tmp_path / "c"

    def write():
        return write_cache(clip, pixel_data, LAYER, folder, shard_images=SHARD, batch_images=2)

    refusal(OSError, write, "shard-00002.bin", "No space left", "free space")
    assert sorted(contents(folder)) == [f"shard-0000{k}.{end}" for k in range(2) for end in ("bin", "json")]
    monkeypatch.undo()
    assert contents(write().folder) == contents(write_cache(clip, pixel_data, LAYER, tmp_path / "d", shard_images=SHARD,
                                                            batch_images=2).folder)


def test_a_folder_that_cannot_be_written(clip, pixel_data, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    refusal(OSError, lambda: write_cache(clip, pixel_data, LAYER, tmp_path / "file" / "c"), "Cannot write")
    assert (tmp_path / "file").read_text() == "not a folder"


def test_a_cache_that_is_too_large_is_refused_before_anything_is_written(clip, pixel_data, tmp_path, monkeypatch):
    folder, size = tmp_path / "a" / "b", cache_bytes(clip, 23)
    assert size == 23 * 5 * 12 * 2

    def write(**settings):
        return write_cache(clip, pixel_data, LAYER, folder, **settings)

    refusal(ValueError, lambda: write(most_bytes=size - 1), f"most_bytes={size}", "make cache", str(folder))
    monkeypatch.setattr(cache, "free_bytes", lambda folder: size - 1)
    refusal(OSError, write, "are free", "choose another folder")
    assert not folder.parent.exists()
    monkeypatch.setattr(cache, "free_bytes", lambda folder: size)
    assert len(write(most_bytes=size)) == 23


def test_room_is_asked_for_what_is_missing_only(made, clip, pixel_data, monkeypatch):
    for name in ("manifest.json", "shard-00004.bin"):
        (made.folder / name).unlink()
    monkeypatch.setattr(cache, "free_bytes", lambda folder: 3 * 120)
    assert len(write_cache(clip, pixel_data, LAYER, made.folder, shard_images=SHARD)) == 23


def test_size_of_imagenet():
    vit = type("ViT", (), {"n_tokens": 197, "width": 768})
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
    said = refusal(ValueError, lambda: open_cache(*world.sources["own"], world.folders[name]), "manifest.json")
    assert [part for part, how in shards.DIFFERENT.items() if how in said] == [name]


def test_there_is_no_cache_without_a_manifest(clip, pixel_data, tmp_path):
    said = ("manifest.json", "no finished cache", "make cache")
    refusal(FileNotFoundError, lambda: open_cache(clip, pixel_data, LAYER, tmp_path), *said)


def test_a_cache_of_a_later_format(made, clip, pixel_data):
    path = made.folder / "manifest.json"
    save_sealed(path, load_sealed(path) | {"format": 2})
    refusal(ValueError, lambda: open_cache(clip, pixel_data, LAYER, made.folder), "format 2")


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("fault", ["flip", "truncate", "remove"])
def test_damage_after_opening_is_seen_when_reading(made, fault, mapped):
    path = made.folder / "shard-00003.bin"
    if mapped:
        made[[15]]
    if fault == "flip":
        with open(path, "r+b") as file:
            file.seek(2 * 120 + 7)
            file.write(bytes([path.read_bytes()[2 * 120 + 7] ^ 1]))
    elif fault == "truncate":
        os.truncate(path, 2 * 120 + 7)
    else:
        path.unlink()
    assert made[range(15)].shape == (15, 5, 12)
    refusal((ValueError, FileNotFoundError), lambda: made[[0, 17]], str(path))
    refusal((ValueError, FileNotFoundError), lambda: list(made.batches([[1], [17], [2]])), str(path))


def test_verify_reads_everything(made, clip, pixel_data):
    made.verify()
    made.verify(clip, pixel_data)
    path = made.folder / "shard-00004.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"\x77")
    refusal(ValueError, made.verify, str(path), "sha256")


def test_verify_compares_with_the_images_and_the_model(made, clip, pixel_data):
    changed = pixel_data.pixels.clone()
    changed[8] += 1
    refusal(ValueError, lambda: made.verify(clip, ArrayDataset(changed, pixel_data.labels)), "shard-00001.json",
            "position 8")
    labels = (pixel_data.labels + (np.arange(23) == 22)) % 5
    refusal(ValueError, lambda: made.verify(clip, ArrayDataset(pixel_data.pixels, labels)), "shard-00004.json", "22")
    other = Clip(random_clip_model(1), None, tiny_processor())
    refusal(ValueError, lambda: made.verify(other, pixel_data), "shard-00000.bin", "other tokens")


def test_verify_misses_no_image(clip, many_files, tmp_path):
    held = write_cache(clip, many_files, LAYER, tmp_path / "c", shard_images=4)
    many_files.files[5][0].write_bytes(b"gone")
    refusal(ValueError, lambda: held.verify(clip, many_files), "1 images", "Cannot read the image")


# What half precision cannot hold

def test_values_too_large_for_float16(clip, pixel_data, tmp_path, monkeypatch):
    below = clip.below
    monkeypatch.setattr(clip, "below", lambda pixels, layer: below(pixels, layer) * 1e5)
    refusal(ValueError, lambda: write_cache(clip, pixel_data, LAYER, tmp_path / "c"), "position 0", "choose bfloat16")
    assert not contents(tmp_path / "c")
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


# The command

@pytest.fixture
def command(clip, pixel_data, tmp_path, monkeypatch, capsys):
    """``python -m patchsae cache`` on tiny things; returns what it prints, or what it exits with."""
    folder = tmp_path / "activations"
    monkeypatch.setattr(cache, "load_clip", lambda *_: clip)
    monkeypatch.setattr(cache, "open_dataset", lambda *_: pixel_data)
    monkeypatch.setattr(cache, "cache_folder", lambda *_: folder)
    monkeypatch.setattr(cache.processes, "join", lambda: None)

    def run(*arguments, answer=None):
        def respond(question):
            if answer is None:
                raise EOFError
            print(question, end="")
            return answer

        monkeypatch.setattr("builtins.input", respond)
        monkeypatch.setattr(sys, "argv", ["cache", *arguments])
        cache.main()
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
    with pytest.raises(SystemExit, match="dtype float16, not bfloat16"):
        command("--yes", "--dtype", "bfloat16")
    assert len(open_cache(clip, pixel_data, LAYER, command.folder)) == 23


def test_the_command_says_what_is_damaged(command):
    command("--yes", "--dtype", "bfloat16")
    path = command.folder / "shard-00000.bin"
    path.write_bytes(b"\0" + path.read_bytes()[1:])
    with pytest.raises(SystemExit, match="shard-00000.bin is damaged"):
        command("--verify")
    path.unlink()
    with pytest.raises(SystemExit, match="shard-00000.bin is missing"):
        command("--verify")
    assert "bfloat16 takes" in command("--yes", "--dtype", "bfloat16")


def test_the_folder_depends_on_everything_a_cache_is_made_of(profile, clip, pixel_data, image_data):
    first = cache_folder(profile, clip, pixel_data)
    assert first == cache_folder(profile, clip, pixel_data) and first.parent == profile.run_dir / "activations"
    others = [cache_folder(profile.at_layer(0), clip, pixel_data), cache_folder(profile, clip, image_data),
              cache_folder(profile, Clip(random_clip_model(1), None, tiny_processor()), pixel_data),
              cache_folder(profile, Clip(clip.model), pixel_data)]
    assert len({first, *others}) == 5 and cache_folder(profile.at_layer(2), clip, pixel_data) == first


def test_it_can_be_read_without_a_model(made):
    assert torch.equal(Cache(made.folder, load_sealed(made.folder / "manifest.json"))[[4]], made[[4]])
