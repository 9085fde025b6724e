"""The pictogram world: same bytes everywhere, maps that say what the plan says, and labels in balance."""

import functools
import hashlib

import numpy as np
import pytest
from conftest import refused

from patchsae.data.images import content_id
from patchsae.world.dataset import SceneDataset
from patchsae.world.pretrain import build_tokenizer
from patchsae.world.scenes import (
    BACKGROUNDS,
    CLASS_NAMES,
    COLOURS,
    CONCEPTS,
    GROUPS,
    KINDS,
    NAMES,
    NOUNS,
    PATCH,
    SIZE,
    TASKS,
    TEXTURES,
    WORLD,
    caption,
    class_names,
    draw_scene,
)

#: Images, maps and captions of scenes (0, 0), (0, 1), (1, 7) and (2, 12345) of every task.
KNOWN = {"nouns": "9d14e60dc8eca4c5", "sketches": "1b3d50a6fc1d665e", "textures": "18284b4adf8b54bd",
         "backgrounds": "619c23632aa97844", "colours": "c8af0582edc41584", "words": "06146ecf5792081d",
         "pairs": "2ef65f29ed58e4df", "counting": "5da93b2a5cb850f4", "aerial": "5eaf237cf14558ae",
         "pretraining": "977ce94f41e374ce", "new_words": "f4443fd2ebe078fe", "groups": "19158f1247c9855d",
         "bags": "270bda6da4a8ebf6", "noun_cycle": "d292e85b10ffb304", "colour_words": "0ee624f5cbd402b7",
         "colour_rows": "b40fae7efee7d7c0", "words_or_rows": "2799967755f055a0", "nouns_and_rows": "fc3397b211c349c7",
         "noun_rows": "e46b155afe4a717f", "colour_pairs": "017e17fa09a4903b", "new_colours": "5cbc6f88d5994532",
         "colour_cycle": "6aa56bd676baf124"}
every_task = pytest.mark.parametrize("task", KNOWN)


def plane(scene, kind):
    return scene.maps[KINDS.index(kind)]


@functools.cache
def many(task, n=60, seed=0):
    return [draw_scene(task, seed, i) for i in range(n)]


def square(thing):
    """The pixels that a thing fills."""
    return slice(thing.top, thing.top + thing.side), slice(thing.left, thing.left + thing.side)


# A pure function

@every_task
def test_scenes_are_the_known_bytes(task):
    digest = hashlib.sha256()
    for seed, index in ((0, 0), (0, 1), (1, 7), (2, 12345)):
        scene = draw_scene(task, seed, index)
        digest.update(scene.image.tobytes() + scene.maps.tobytes() + caption(scene.plan).encode())
    assert digest.hexdigest()[:16] == KNOWN[task]


def test_a_scene_depends_on_task_seed_and_index_alone():
    state, one = np.random.get_state()[1].copy(), draw_scene("nouns", 3, 17)
    kept = one.image.copy(), one.maps.copy()
    one.image[:], one.maps[:] = 0, 0  # writing into a scene does not change the next
    again = draw_scene("nouns", 3, 17)
    assert np.array_equal(again.image, kept[0]) and np.array_equal(again.maps, kept[1]) and again.plan == one.plan
    assert np.array_equal(np.random.get_state()[1], state)


# Labels

@pytest.mark.parametrize("task", TASKS)
def test_tasks_have_at_least_eight_classes_each_equally_often(task):
    names = class_names(task)
    assert len(names) >= 8 and len(set(names)) == len(names)
    labels = [draw_scene(task, 0, i).label for i in range(1000, 1000 + len(names))]
    assert sorted(labels) == list(range(len(names)))


def test_nouns_are_ordered_by_group():
    groups = [GROUPS[noun] for noun in class_names("nouns")]
    assert groups == sorted(groups, key=list(WORLD["nouns"]).index)
    assert class_names("nouns") == class_names("sketches") == NOUNS and set(CLASS_NAMES) == set(WORLD["tasks"])
    assert all(groups.count(group) == len(NOUNS) / len(WORLD["nouns"]) for group in WORLD["nouns"])


#: What a scene of each task and class name has to show: name, plan, its first object.
SHOWS = {
    "nouns": lambda name, plan, first: first.noun == name,
    "pretraining": lambda name, plan, first: first.noun == name,
    "sketches": lambda name, plan, first: first.noun == name and plan.style == "sketch",
    "textures": lambda name, plan, first: first.texture == name and not plan.word,
    "colours": lambda name, plan, first: first.colour == name,
    "backgrounds": lambda name, plan, first: plan.background == name,
    "words": lambda name, plan, first: plan.word == name,
    "pairs": lambda name, plan, first: f"{first.colour} {first.noun}" == name,
    "aerial": lambda name, plan, first: plan.aerial == name,
    "counting": lambda name, plan, first: NAMES["counts"][len(plan.things) - 1] == name and (
        {thing.noun for thing in plan.things} == {first.noun})}


@pytest.mark.parametrize("task", SHOWS)
def test_the_label_is_what_is_drawn(task):
    for scene in many(task, 70):
        name, plan = class_names(task)[scene.label], scene.plan
        assert plan.label == scene.label and SHOWS[task](name, plan, plan.things[0] if plan.things else None), plan
        assert plan.style == "photo" or task in ("sketches", "nouns", "pretraining")


def test_attributes_beyond_pretraining_are_not_in_pretraining():
    plans = [scene.plan for scene in many("pretraining", 400, seed=2)]
    things = [thing for plan in plans for thing in plan.things]
    seen = [{thing.noun for thing in things}, {thing.colour for thing in things}, {thing.texture for thing in things},
            {plan.background for plan in plans}]
    assert seen == [set(NOUNS), set(COLOURS), set(NAMES["textures"]), set(NAMES["backgrounds"])]
    assert not any(plan.aerial for plan in plans) and max(len(plan.things) for plan in plans) == 2
    shares = [np.mean(values) for values in zip(*((p.style == "sketch", bool(p.word), len(p.things) == 2)
                                                  for p in plans))]
    assert 0.15 < shares[0] < 0.35 and 0.15 < shares[1] < 0.35 and 0.2 < shares[2] < 0.4


# Maps

@every_task
def test_maps_say_what_the_plan_says(task):
    for scene in many(task):
        plan, maps = scene.plan, scene.maps
        assert scene.image.shape == (SIZE, SIZE, 3) and scene.image.dtype == np.uint8
        assert maps.shape == (len(KINDS), SIZE, SIZE) and maps.dtype == np.int8
        if plan.aerial:
            assert (maps == -1).all()
            continue
        photo, noun, text = plan.style == "photo", plane(scene, "noun"), plane(scene, "text")
        assert (plane(scene, "style") == CONCEPTS["style"].index(plan.style)).all()
        # Only planned concepts, each inside the square of its own thing; things lie apart, inside the scene.
        inside = np.zeros((SIZE, SIZE), bool)
        for thing in plan.things:
            region = square(thing)
            assert inside[region].shape == (thing.side, thing.side) and not inside[region].any()
            inside[region] = True
            here = noun[region] >= 0
            for kind in ("noun", "colour", "texture"):
                expected = CONCEPTS[kind].index(getattr(thing, kind)) if photo or kind == "noun" else -1
                assert (plane(scene, kind)[region][here] == expected).all()
            assert plan.word or here.sum() > 0.08 * thing.side**2, "a glyph fills some of its square"
        assert not (noun[~inside] >= 0).any()
        # Colour and texture are known exactly where the noun is, and only in photos.
        for kind in ("colour", "texture"):
            assert np.array_equal(plane(scene, kind) >= 0, (noun >= 0) & photo)
        # The background is what neither an object nor the sign covers.
        ground = BACKGROUNDS.index(plan.background) if photo else -1
        assert np.array_equal(plane(scene, "background"), np.where((noun >= 0) | (text >= 0), -1, ground))
        # The sign is one full rectangle with one word, and nothing else is seen through it.
        assert (text >= 0).any() == bool(plan.word) and not (noun[text >= 0] >= 0).any()
        if plan.word:
            ys, xs = np.nonzero(text >= 0)
            sign = text[ys.min():ys.max() + 1, xs.min():xs.max() + 1]
            assert (sign == CONCEPTS["text"].index(plan.word)).all()


def test_pixels_have_the_colour_that_the_maps_say():
    """A photo's object has its colour, or 9/20 of it where the texture is dark, within the shade of 12."""
    for scene in many("colours", 40) + many("nouns", 40):
        for name in COLOURS:
            where = scene.mask("colour", name)
            pixels, colour = scene.image[where].astype(int), np.array(WORLD["colours"][name])
            light = (abs(pixels - colour.clip(0, 255)) <= 12).all(1)
            dark = (abs(pixels - colour * 9 / 20) <= 12 * 9 / 20 + 1).all(1)
            assert (light | dark).all(), (name, pixels[~(light | dark)][:3])
            plain = scene.plan.things[0].texture == "plain" and len(scene.plan.things) == 1
            assert light.all() or not plain


def test_textures_are_dark_and_light_in_their_own_way():
    share = {}
    for scene in many("textures", 60):
        name = scene.plan.things[0].texture
        brightness = scene.image[scene.mask("texture", name)].astype(int).sum(1)
        share.setdefault(name, []).append((brightness < brightness.max() * 0.75).mean())
    means = {name: np.mean(values) for name, values in share.items()}
    assert set(means) == set(TEXTURES) and means.pop("plain") == 0
    assert all(0.1 < mean < 0.9 for mean in means.values())


def test_sketches_have_no_colour():
    for scene in many("sketches", 30):
        body = scene.image[plane(scene, "text") < 0].astype(int)
        assert (body.max(1) - body.min(1)).max() <= 40
        assert 0.01 < (body.sum(1) < 3 * 120).mean() < 0.5


def test_every_glyph_is_another_shape():
    shapes = {}
    for scene in many("sketches", len(NOUNS) * 12):
        thing = scene.plan.things[0]
        if len(scene.plan.things) == 1 and not scene.plan.word and thing.side == 40:
            shapes.setdefault(thing.noun, set()).add(scene.mask("noun", thing.noun)[square(thing)].tobytes())
    assert len(shapes) > 40 and all(len(kinds) == 1 for kinds in shapes.values())
    assert len({next(iter(kinds)) for kinds in shapes.values()}) == len(shapes)


def test_mask_picks_one_concept():
    scene = next(s for s in many("nouns") if len(s.plan.things) == 2 and s.plan.style == "photo")
    for thing in scene.plan.things:
        assert np.array_equal(scene.mask("noun", thing.noun), plane(scene, "noun") == NOUNS.index(thing.noun))
    assert scene.mask("style", "photo").all() and not scene.mask("style", "sketch").any()


@pytest.mark.parametrize("task", ["nouns", "words", "counting", "aerial"])
def test_coverage_is_the_share_of_pixels_of_each_patch(task):
    side = SIZE // PATCH
    for scene, kind in ((scene, kind) for scene in many(task)[:4] for kind in KINDS):
        share = scene.coverage(kind)
        assert share.shape == (side, side, len(CONCEPTS[kind])) and share.dtype == np.float32
        for row, column in np.ndindex(side, side):
            patch = plane(scene, kind)[row * PATCH:(row + 1) * PATCH, column * PATCH:(column + 1) * PATCH]
            expected = [(patch == c).sum() / PATCH**2 for c in range(share.shape[2])]
            assert share[row, column].tolist() == expected


# Captions

@every_task
def test_the_caption_names_every_attribute_in_words_that_the_tokenizer_knows(task):
    tokenizer = build_tokenizer()
    texts = [WORLD["tasks"][task]["template"].format(name) for name in class_names(task)]
    for scene in many(task):
        plan, text = scene.plan, caption(scene.plan)
        words = text.rstrip(".").split()
        texts.append(text)
        assert text.endswith(".") and "{" not in text
        if plan.aerial:
            assert plan.aerial in words and "satellite" in words
            continue
        assert plan.style in words and (plan.word in words if plan.word else "word" not in words)
        if plan.style == "photo":
            assert all(f"{thing.colour} {thing.texture} {thing.noun}" in text for thing in plan.things)
            assert f"on {plan.background}" in text
        else:
            assert {thing.noun for thing in plan.things} <= set(words)
            assert not set(words) & {*BACKGROUNDS, *TEXTURES, *COLOURS}
    for ids in tokenizer(texts, truncation=task == "counting")["input_ids"]:  # eight objects make a long caption
        assert tokenizer.unk_token_id not in ids and ids[0] == tokenizer.bos_token_id
        assert ids[-1] == tokenizer.eos_token_id or task == "counting"
        assert len(ids) <= tokenizer.model_max_length == 32


def test_a_caption_names_attributes_with_the_probability_it_is_given():
    plan = next(s.plan for s in many("words") if s.plan.word and s.plan.things[0].noun not in s.plan.word)
    rng, thing = np.random.default_rng(0), plan.things[0]
    captions = [caption(plan, rng, 0.35) for _ in range(3000)]
    for attribute in (thing.colour, thing.texture, thing.noun, f"on {plan.background}", f"the word {plan.word}"):
        assert np.mean([attribute in text for text in captions]) == pytest.approx(0.35, abs=0.04), attribute
    assert caption(plan, np.random.default_rng(0), 1.0) == caption(plan)
    assert caption(plan, rng, 0.0) == "a photo of a scene."


# The data set

def test_scenes_as_a_source_of_images():
    ds = SceneDataset("nouns", "test", 5)
    assert len(ds) == 5 and ds.class_names == class_names("nouns")
    for i, item in enumerate(ds):
        scene = draw_scene("nouns", 1, i)
        assert np.array_equal(item.image, scene.image) and item.label == scene.label
        assert item.id == content_id(scene.image) and np.array_equal(ds.scene(i).maps, scene.maps)
    for outside in (5, -1):
        with refused("outside the 5 scenes", IndexError):
            ds[outside]


@pytest.mark.parametrize("task", TASKS)
def test_splits_and_pretraining_share_no_image(task):
    scenes = [*many(task), *many(task, seed=1), *many("pretraining", seed=2)]
    assert [item.id for item in SceneDataset(task, "train", 9)] == [content_id(s.image) for s in scenes[:9]]
    assert len({content_id(scene.image) for scene in scenes}) == len(scenes) == 180


@pytest.mark.parametrize("call", [
    lambda: draw_scene("nowhere", 0, 0), lambda: class_names("nowhere"), lambda: SceneDataset("nowhere", "train", 3),
    lambda: SceneDataset("nouns", "val", 3)])
def test_what_does_not_exist_is_one_sentence(call):
    with refused():
        call()
