"""Adapting to a task: few shots, schedules, what each method may change, and that what is kept comes back."""

import dataclasses
import random

import numpy as np
import peft
import pytest
import torch
from conftest import SIDE, one_sentence
from PIL import Image
from test_maple import CLASSES

from patchsae import ArrayDataset
from patchsae.clip import Clip
from patchsae.config import MethodSettings, load_profile
from patchsae.data.images import FileDataset
from patchsae.studies import adapt
from patchsae.studies.adapt import (
    METHODS,
    UNTRAINED,
    Recipe,
    adaptation_key,
    adapted_model,
    few_shots,
    halves,
    kept_folder,
    unadapted,
)
from patchsae.studies.study import Study
from patchsae.weights.files import result_key


@pytest.fixture
def task_data():
    """30 preprocessed images of five classes; each class is brighter in a row of its own, so that it can be learned."""
    numbers = torch.Generator().manual_seed(4)
    labels = np.arange(30) % 5
    pixels = 0.3 * torch.randn(30, 3, SIDE, SIDE, generator=numbers)
    for pixel, label in zip(pixels, labels):
        pixel[:, 3 * label:3 * label + 3] += 2
    return ArrayDataset(pixels, labels, class_names=("cat", "dog", "pig", "owl", "duck"))


@pytest.fixture
def quick(profile, clip, task_data, tmp_path, monkeypatch):
    """A study of few and large training steps on these images, writing elsewhere."""
    method = MethodSettings(learning_rate=0.05, epochs=4, least_steps=0, batch_images=4)
    settings = dataclasses.replace(profile.adaptation, tasks=("nouns",), shots=4, seeds=(1,))
    monkeypatch.setattr("patchsae.config.ROOT", tmp_path)
    return study_of(dataclasses.replace(profile, adaptation=settings, maple=method, coop=method, lora=method,
                                        fine_tuning=dataclasses.replace(method, learning_rate=1e-3)), clip, task_data)


def study_of(profile, clip, images):
    """A study whose tasks are all the same images."""
    study = Study(profile)
    study.clip, study.images = clip, lambda task, split: images
    return study


def test_halves_cover_all_classes_and_the_base_half_is_the_larger(task_data):
    assert halves(task_data) == {"base": range(3), "novel": range(3, 5)}


def test_few_shots_are_drawn_as_coop_draws_them(task_data):
    shots = few_shots(task_data, range(3), shots=2, seed=7)
    stream, expected = random.Random(7), []
    for label in range(5):  # all classes are drawn from the stream, then those that are not base are dropped
        drawn = stream.sample([i for i in range(30) if i % 5 == label], 2)
        expected += drawn if label < 3 else []
    assert shots.rows.tolist() == expected and shots.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert len(few_shots(task_data, range(5), shots=99, seed=0)) == 30
    assert few_shots(task_data, range(3), 2, 8).rows.tolist() != expected


def test_a_subset_keeps_ids_and_relabels(task_data):
    part = few_shots(task_data, range(3, 5), shots=2, seed=1)
    assert part.class_names == ("owl", "duck") and set(part.labels) == {0, 1}
    for i in range(len(part)):
        item, whole = part[i], task_data[int(part.rows[i])]
        assert item.id == whole.id and item.label == whole.label - 3


def test_rates_of_the_published_schedule():
    rates = [adapt.WARM_UP_RATE, *adapt._cosine(0.0035, 5)[:-1]]
    assert np.allclose(rates, [1e-5, 3.5e-3, 3.16578e-3, 2.29078e-3, 1.20922e-3], rtol=1e-5)


@pytest.mark.parametrize("images, epochs", [(80, 5), (8000, 5), (3, 20), (16, 5)])
def test_small_sets_get_more_epochs(images, epochs):
    method = MethodSettings(learning_rate=0.1, epochs=5, least_steps=20, batch_images=4)
    assert method.epochs_of(images) == max(5, -(-20 // max(1, images // 4))) >= epochs


def test_batches_use_every_image_once_and_drop_the_rest():
    found = adapt._batches(11, 4, np.random.default_rng(0))
    assert [len(b) for b in found] == [4, 4] and len(set(np.concatenate(found))) == 8
    assert [len(b) for b in adapt._batches(3, 4, np.random.default_rng(0))] == [3]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_its_few_shots_and_leaves_clip_alone(clip, quick, task_data, method):
    before = clip.fingerprint()
    recipe = Recipe(quick, "nouns", method, 1)
    model, plain = adapt.adapt(recipe), unadapted(quick, "nouns")
    assert clip.fingerprint() == before
    shots = few_shots(task_data, range(3), 4, 1)

    def loss(m):
        logits = m.tower.logits(adapt.image_embeddings(m.tower, shots), m.text(shots.class_names))
        return torch.nn.functional.cross_entropy(logits, torch.from_numpy(shots.labels)).item()

    start = (adapt.as_adapted(adapt.new_prompts(recipe, shots.class_names)) if method in ("maple", "coop") else plain)
    assert loss(model) < loss(start)
    changes_tower = not torch.equal(model.tower.below(shots.ds.pixels, 1)[:, :clip.n_tokens],
                                    clip.below(shots.ds.pixels, 1))
    assert changes_tower == (method in ("maple", "lora", "fine-tuning"))
    if method in ("lora", "fine-tuning"):
        assert not any("lora" in name for name, _ in model.tower.model.named_parameters())
        assert torch.equal(model.text(CLASSES), plain.text(CLASSES))
    if method == "linear probe":
        assert torch.equal(model.text(["owl"]), plain.text(["owl"]))
        assert not torch.equal(model.text(["cat"]), plain.text(["cat"]))


@pytest.mark.parametrize("method", ["maple", "lora", "fine-tuning"])
def test_training_is_a_function_of_its_seed(clip, quick, task_data, method):
    first, again, other = (adapt.adapt(Recipe(quick, "nouns", method, seed)) for seed in (1, 1, 2))
    assert first.tower.fingerprint() == again.tower.fingerprint() != other.tower.fingerprint()


def test_merged_lora_is_what_was_trained(clip, quick, task_data, monkeypatch):
    kept, pixels, wrap = {}, task_data.pixels[:2], peft.get_peft_model

    def watched(*arguments):
        lora = wrap(*arguments)
        merge = lora.merge_and_unload

        def merged():
            kept["before"] = lora(pixel_values=pixels).pooler_output
            return merge()

        lora.merge_and_unload = merged
        return lora

    monkeypatch.setattr(peft, "get_peft_model", watched)
    tower = adapt.adapt(Recipe(quick, "nouns", "lora", 1)).tower
    after = tower.model.vision_model(pixel_values=pixels).pooler_output
    assert torch.allclose(after, kept["before"], atol=1e-4)
    assert not torch.allclose(after, clip.model.vision_model(pixel_values=pixels).pooler_output, atol=1e-2)
    assert tower.model.state_dict().keys() == clip.model.state_dict().keys()


@pytest.mark.parametrize("method", ["maple", "coop", "lora", "fine-tuning"])
def test_an_adapted_model_is_kept_and_read_again(clip, quick, task_data, method, monkeypatch):
    recipe = Recipe(quick, "nouns", method, 1)
    assert kept_folder(recipe) is None
    first = adapted_model(recipe)
    monkeypatch.setattr(adapt, "adapt", lambda _: pytest.fail("trained again"))
    again, x = adapted_model(recipe), task_data.pixels[:3]
    assert kept_folder(recipe) == quick.profile.run_dir / "adapted" / adaptation_key(recipe)
    assert torch.equal(first.tower.below(x, 2), again.tower.below(x, 2))
    assert torch.allclose(first.text(CLASSES), again.text(CLASSES), atol=1e-6)


def test_keys_tell_settings_apart(clip, quick, task_data):
    recipe, p = Recipe(quick, "nouns", "maple", 1), quick.profile
    slower = dataclasses.replace(p, maple=dataclasses.replace(p.maple, epochs=9))
    more = dataclasses.replace(p, adaptation=dataclasses.replace(p.adaptation, seeds=(1, 2, 3)))
    key = adaptation_key(recipe)
    assert adaptation_key(recipe._replace(study=study_of(more, clip, task_data))) == key
    others = [recipe._replace(study=study_of(slower, clip, task_data)), recipe._replace(seed=2),
              recipe._replace(method="coop"), recipe._replace(classes="all"), recipe._replace(method=UNTRAINED)]
    assert len({key, *map(adaptation_key, others)}) == 6


def test_all_images_are_every_one_of_the_classes(clip, quick, task_data):
    recipe = Recipe(quick, "nouns", "maple", 1, images="all")
    base, whole = recipe.shots(), recipe._replace(classes="all").shots()
    assert base.rows.tolist() == [i for i in range(30) if i % 5 < 3] and base.class_names == ("cat", "dog", "pig")
    assert base.labels.tolist() == [i % 5 for i in base.rows]
    assert whole.rows.tolist() == list(range(30)) and whole.class_names == task_data.class_names
    assert len(recipe._replace(images="shots").shots()) == 3 * quick.profile.adaptation.shots < len(base)


def test_all_images_have_a_key_of_their_own_and_shots_the_one_they_had(clip, quick, task_data):
    recipe, p = Recipe(quick, "nouns", "maple", 1, images="all"), quick.profile
    fewer = dataclasses.replace(p, adaptation=dataclasses.replace(p.adaptation, shots=2))
    elsewhere = study_of(fewer, clip, task_data)
    assert adaptation_key(recipe) != adaptation_key(recipe._replace(images="shots"))
    assert adaptation_key(recipe) == adaptation_key(recipe._replace(study=elsewhere))
    few = recipe._replace(images="shots")
    assert adaptation_key(few) != adaptation_key(few._replace(study=elsewhere))
    shared = {name: getattr(p.adaptation, name) for name in ("shots", "n_prompts", "depth", "augment")}
    assert adaptation_key(few) == result_key(
        adapt.VERSION, clip=quick.clip_key, images=task_data.fingerprint(), task="nouns", method="maple", seed=1,
        classes="base", adaptation=shared, settings={name: getattr(p.maple, name) for name in adapt.TRAINED_BY})


def test_all_images_teach_more_than_shots(quick):
    few, every = (adapt.adapt(Recipe(quick, "nouns", "linear probe", 1, images=images)) for images in ("shots", "all"))
    assert not torch.equal(few.text(["cat"]), every.text(["cat"]))


def test_logits_are_float32_where_the_towers_run_in_bfloat16(clip, quick, monkeypatch):
    """As on CUDA: embeddings and text come out of autocast in bfloat16, whose logits of 16 to 32 lie 0.125 apart."""
    autocast, seen = torch.autocast, []

    def logits(self, embeddings, text, original=Clip.logits):
        seen.append((embeddings, original(self, embeddings, text)))
        return seen[-1][1]

    monkeypatch.setattr(torch, "autocast", lambda kind, dtype, enabled: autocast("cpu", torch.bfloat16))
    monkeypatch.setattr(Clip, "logits", logits)
    adapt.adapt(Recipe(quick, "nouns", "maple", 1))
    embeddings, values = seen[-1]
    assert torch.equal(embeddings, embeddings.bfloat16().float()), "the towers did not run in bfloat16"
    assert values.dtype == torch.float32 and not torch.equal(values, values.bfloat16().float())


def test_augmented_images_have_the_models_size_and_follow_the_generator(clip, image_data):
    first, again = (adapt.augmented(clip, image_data, range(4), np.random.default_rng(3)) for _ in range(2))
    assert first.shape == (4, 3, SIDE, SIDE) and torch.equal(first, again)
    assert not torch.equal(first, adapt.augmented(clip, image_data, range(4), np.random.default_rng(4)))


def test_crops_are_cut_from_the_whole_file_as_pillow_cuts_them(clip, quick, tmp_path):
    """Pictures twice as wide as high: left, middle and right are of three colours, and a model's crop has one of them.
    The crops that are learned from are Pillow's of the decoded file, and most of them reach into the margins."""
    colours = np.zeros((24, 48, 3), np.uint8)
    colours[:, :8, 0] = colours[:, 8:40, 1] = colours[:, 40:, 2] = 255
    files = [(tmp_path / f"{label}.png", label) for label in range(5)]
    for path, label in files:
        Image.fromarray(colours[:, :48 - label]).save(path)  # of several sizes
    ds = FileDataset(tmp_path, files, ("cat", "dog", "pig", "owl", "duck"), SIDE)
    assert set(np.flatnonzero(ds[0].image.reshape(-1, 3).any(0))) == {1}
    whole = dataclasses.replace(quick.profile.adaptation, augment=True)
    recipe = Recipe(study_of(dataclasses.replace(quick.profile, adaptation=whole), clip, ds), "nouns", "maple")
    shots = recipe.shots()
    assert not shots.from_files and [shots[i].image.shape for i in range(3)] == [(24, 48 - i, 3) for i in range(3)]
    rows, reached = [0, 1, 2] * 40, 0
    found, rng = adapt.augmented(clip, shots, rows, np.random.default_rng(5)), np.random.default_rng(5)
    for pixels, row in zip(found, rows):
        with Image.open(files[row][0]) as picture:
            cut = picture.crop(adapt._crop(*picture.size, rng)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        cut = np.asarray(cut)[:, ::-1] if rng.random() < 0.5 else np.asarray(cut)
        assert torch.equal(pixels, clip.pixels(cut)[0])
        reached += bool(cut[:, :, [0, 2]].any())
    assert reached > len(rows) / 3
    plain = Recipe(study_of(quick.profile, clip, ds), "nouns", "maple")
    assert adaptation_key(recipe) != adaptation_key(plain) and plain.shots()[1].image.shape == (SIDE, SIDE, 3)
    assert recipe._replace(method="linear probe").shots()[1].image.shape == (SIDE, SIDE, 3)


def test_each_protocol_has_its_settings(clip, quick, task_data):
    """The published ones: MaPLe's depth, epochs and rate where all classes are learned, CoOp's epochs on ImageNet."""
    paper = load_profile("paper")

    def of(method, task, classes):
        recipe = Recipe(study_of(paper, clip, task_data), task, method, 1, classes)
        return recipe.depth, recipe.settings.epochs, recipe.settings.learning_rate

    assert of("maple", "imagenet", "base") == of("maple", "eurosat", "base") == (9, 5, 0.0035)
    assert of("maple", "imagenet", "all") == (3, 2, 0.0026)
    assert [of("coop", *where)[1] for where in (("dtd", "base"), ("imagenet", "base"), ("imagenet", "all"))] == [
        200, 50, 50]
    same = Recipe(study_of(load_profile("mini"), clip, task_data), "nouns", "maple", 1)
    assert (same.depth, same.settings) == (same._replace(classes="all").depth, same._replace(classes="all").settings)
    settings = dataclasses.replace(quick.profile.maple, own_task_epochs=7, transfer_learning_rate=0.1)
    other = study_of(dataclasses.replace(quick.profile, maple=settings), clip, task_data)
    base = Recipe(quick, "words", "maple", 1)
    assert adaptation_key(base) == adaptation_key(base._replace(study=other))
    for changed in (base._replace(task="nouns"), base._replace(classes="all")):
        assert adaptation_key(changed) != adaptation_key(changed._replace(study=other))


def test_crops_lie_inside_and_have_the_published_areas():
    rng = np.random.default_rng(0)
    boxes = np.array([adapt._crop(200, 120, rng) for _ in range(500)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area, ratio = width * height / (200 * 120), width / height
    assert boxes.min() >= 0 and boxes[:, 2].max() <= 200 and boxes[:, 3].max() <= 120
    assert 0.07 < area.min() and area.max() <= 1
    assert 0.7 < ratio.min() and ratio.max() < 1.4
    assert adapt._crop(900, 30, np.random.default_rng(0)) == (430, 0, 470, 30)  # nothing fits: the middle
    assert adapt._crop(30, 900, np.random.default_rng(0)) == (0, 430, 30, 470)


def test_an_unknown_method_is_one_sentence(clip, quick, task_data):
    with pytest.raises(ValueError, match="prefix") as error:
        adapt.adapt(Recipe(quick, "nouns", "prefix", 1))
    assert one_sentence(error.value)


def test_shots_that_cannot_be_read_are_left_out(quick, clip, tmp_path):
    """Ten files of five classes, the third of them no image: the others are learned from."""
    files = [(tmp_path / f"{i}.png", i % 5) for i in range(10)]
    for i, (path, _) in enumerate(files):
        Image.fromarray(np.full((SIDE, SIDE, 3), 20 * i, np.uint8)).save(path)
    files[2][0].write_bytes(b"no image")
    ds = FileDataset(tmp_path, files, ("cat", "dog", "pig", "owl", "duck"), SIDE)
    recipe = Recipe(study_of(quick.profile, clip, ds), "nouns", "maple")
    shots = recipe.shots()
    assert shots.labels.tolist() == [0, 0, 1, 1, 2]
    assert [shots[i].id for i in range(5)] == [ds[i].id for i in (0, 5, 1, 6, 7)]
    assert adapted_model(recipe).text(["cat"]).isfinite().all()
