"""The pictogram world: same bytes everywhere, maps that say what the plan says, and labels in balance."""

import hashlib
import time

import numpy as np
import pytest
from conftest import one_sentence

from patchsae.data.images import content_id
from patchsae.world.dataset import SceneDataset
from patchsae.world.scenes import (
    BACKGROUNDS,
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

ALL_TASKS = (*TASKS, "pretraining")
#: Images, maps and captions of scenes (0, 0), (0, 1), (1, 7) and (2, 12345) of every task.
KNOWN = {
    "nouns": "9d14e60dc8eca4c5",
    "sketches": "1b3d50a6fc1d665e",
    "textures": "18284b4adf8b54bd",
    "backgrounds": "619c23632aa97844",
    "colours": "c8af0582edc41584",
    "words": "06146ecf5792081d",
    "pairs": "2ef65f29ed58e4df",
    "counting": "5da93b2a5cb850f4",
    "aerial": "5eaf237cf14558ae",
    "pretraining": "977ce94f41e374ce",
}


def plane(scene, kind):
    return scene.maps[KINDS.index(kind)]


def many(task, n=60, seed=0):
    return [draw_scene(task, seed, i) for i in range(n)]


# A pure function ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ALL_TASKS)
def test_scenes_are_the_known_bytes(task):
    digest = hashlib.sha256()
    for seed, index in ((0, 0), (0, 1), (1, 7), (2, 12345)):
        scene = draw_scene(task, seed, index)
        digest.update(scene.image.tobytes())
        digest.update(scene.maps.tobytes())
        digest.update(scene.caption.encode())
    assert digest.hexdigest()[:16] == KNOWN[task]


def test_a_scene_depends_on_task_seed_and_index_alone():
    np.random.seed(1)
    one = draw_scene("nouns", 3, 17)
    state = np.random.get_state()[1].copy()
    for other in (("nouns", 3, 16), ("sketches", 3, 17), ("nouns", 4, 17), ("textures", 0, 0)):
        assert not np.array_equal(draw_scene(*other).image, one.image)
    again = draw_scene("nouns", 3, 17)
    assert (
        np.array_equal(again.image, one.image)
        and np.array_equal(again.maps, one.maps)
        and again.plan == one.plan
    )
    assert np.array_equal(np.random.get_state()[1], state)


def test_writing_into_a_scene_does_not_change_the_next():
    one = draw_scene("words", 0, 3)
    kept = one.image.copy(), one.maps.copy()
    one.image[:], one.maps[:] = 0, 0
    again = draw_scene("words", 0, 3)
    assert np.array_equal(again.image, kept[0]) and np.array_equal(again.maps, kept[1])


@pytest.mark.parametrize("task", ALL_TASKS)
def test_no_scene_comes_twice(task):
    ids = [content_id(draw_scene(task, seed, i).image) for seed in (0, 1) for i in range(60)]
    assert len(set(ids)) == len(ids)


def test_drawing_is_fast():
    start = time.perf_counter()
    for task in TASKS:
        many(task, 20, seed=9)
    print(f"{(time.perf_counter() - start) / 20 / len(TASKS) * 1e3:.2f} ms a scene")


# Labels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_tasks_have_at_least_eight_classes_each_equally_often(task):
    names = class_names(task)
    assert len(names) >= 8 and len(set(names)) == len(names)
    start = 1000
    labels = [draw_scene(task, 0, i).label for i in range(start, start + len(names))]
    assert sorted(labels) == list(range(len(names)))
    assert all(0 <= s.plan.label == s.label < len(names) for s in many(task, 20))


def test_nouns_are_ordered_by_group():
    groups = [GROUPS[noun] for noun in class_names("nouns")]
    assert groups == sorted(groups, key=list(WORLD["nouns"]).index)
    assert class_names("nouns") == class_names("sketches") == NOUNS
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
    "counting": lambda name, plan, first: NAMES["counts"][len(plan.things) - 1] == name,
}


@pytest.mark.parametrize("task", ALL_TASKS)
def test_the_label_is_what_is_drawn(task):
    for scene in many(task, 70):
        name, plan = class_names(task)[scene.label], scene.plan
        assert SHOWS[task](name, plan, plan.things[0] if plan.things else None), (name, plan)
        if task not in ("sketches", "nouns", "pretraining"):
            assert plan.style == "photo"
        if task == "counting":
            assert len({thing.noun for thing in plan.things}) == 1


def test_attributes_beyond_pretraining_are_not_in_pretraining():
    plans = [s.plan for s in many("pretraining", 400, seed=2)]
    things = [thing for plan in plans for thing in plan.things]
    assert {t.texture for t in things} == set(NAMES["textures"]) and {t.colour for t in things} == set(
        COLOURS
    )
    assert {p.background for p in plans} == set(NAMES["backgrounds"]) and {t.noun for t in things} == set(
        NOUNS
    )
    assert not any(p.aerial for p in plans) and max(len(p.things) for p in plans) == 2
    assert 0.15 < sum(p.style == "sketch" for p in plans) / 400 < 0.35
    assert 0.15 < sum(bool(p.word) for p in plans) / 400 < 0.35
    assert 0.2 < sum(len(p.things) == 2 for p in plans) / 400 < 0.4


# Maps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ALL_TASKS)
def test_maps_say_what_the_plan_says(task):
    for scene in many(task):
        plan, maps = scene.plan, scene.maps
        assert scene.image.shape == (SIZE, SIZE, 3) and scene.image.dtype == np.uint8
        assert maps.shape == (len(KINDS), SIZE, SIZE) and maps.dtype == np.int8
        if plan.aerial:
            assert (maps == -1).all()
            continue
        photo = plan.style == "photo"
        assert (plane(scene, "style") == CONCEPTS["style"].index(plan.style)).all()
        noun, text = plane(scene, "noun"), plane(scene, "text")
        # Only planned concepts, each inside the square of its own thing.
        inside = np.zeros((SIZE, SIZE), bool)
        for thing in plan.things:
            square = np.zeros((SIZE, SIZE), bool)
            square[thing.top : thing.top + thing.side, thing.left : thing.left + thing.side] = True
            assert square.sum() == thing.side**2 and not (inside & square).any(), (
                "things lie apart, inside the scene"
            )
            inside |= square
            here = square & (noun >= 0)
            assert (noun[here] == NOUNS.index(thing.noun)).all()
            for kind, name in (("colour", thing.colour), ("texture", thing.texture)):
                expected = CONCEPTS[kind].index(name) if photo else -1
                assert (plane(scene, kind)[here] == expected).all()
            if not plan.word:
                assert here.sum() > 0.08 * thing.side**2, "a glyph fills some of its square"
        assert not (noun[~inside] >= 0).any()
        # Colour and texture are known exactly where the noun is, and only in photos.
        for kind in ("colour", "texture"):
            assert np.array_equal(plane(scene, kind) >= 0, (noun >= 0) & photo)
        # The background is what neither an object nor the sign covers.
        covered = (noun >= 0) | (text >= 0)
        expected = np.where(covered | (not photo), -1, BACKGROUNDS.index(plan.background) if photo else -1)
        assert np.array_equal(plane(scene, "background"), expected)
        # The sign is one full rectangle with one word, and nothing else is seen through it.
        assert (text >= 0).any() == bool(plan.word)
        if plan.word:
            ys, xs = np.nonzero(text >= 0)
            assert (
                text[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1] == CONCEPTS["text"].index(plan.word)
            ).all()
            assert not (noun[text >= 0] >= 0).any()


def test_pixels_have_the_colour_that_the_maps_say():
    """A photo's object has its colour, or 9/20 of it where the texture is dark, within the shade of 12."""
    for scene in many("colours", 40) + many("nouns", 40):
        for name in COLOURS:
            where = scene.mask("colour", name)
            if not where.any():
                continue
            pixels, colour = scene.image[where].astype(int), np.array(WORLD["colours"][name])
            light = (abs(pixels - colour.clip(0, 255)) <= 12).all(1)
            dark = (abs(pixels - colour * 9 / 20) <= 12 * 9 / 20 + 1).all(1)
            assert (light | dark).all(), (name, pixels[~(light | dark)][:3])
            if scene.plan.things[0].texture == "plain" and len(scene.plan.things) == 1:
                assert light.all()


def test_textures_are_dark_and_light_in_their_own_way():
    share = {}
    for scene in many("textures", 60):
        thing = scene.plan.things[0]
        where = scene.mask("texture", thing.texture)
        brightness = scene.image[where].astype(int).sum(1)
        share.setdefault(thing.texture, []).append((brightness < brightness.max() * 0.75).mean())
    means = {name: np.mean(values) for name, values in share.items()}
    assert set(means) == set(TEXTURES) and means["plain"] == 0
    assert all(0.1 < means[name] < 0.9 for name in TEXTURES if name != "plain")


def test_sketches_have_no_colour():
    for scene in many("sketches", 30):
        body = scene.image[plane(scene, "text") < 0].astype(int)
        assert (body.max(1) - body.min(1)).max() <= 40
        outline = body.sum(1) < 3 * 120
        assert 0.01 < outline.mean() < 0.5


def test_every_glyph_is_another_shape():
    shapes = {}
    for i in range(len(NOUNS) * 12):
        scene = draw_scene("sketches", 0, i)
        if len(scene.plan.things) == 1 and not scene.plan.word and scene.plan.things[0].side == 40:
            thing = scene.plan.things[0]
            cut = scene.mask("noun", thing.noun)[thing.top : thing.top + 40, thing.left : thing.left + 40]
            shapes.setdefault(thing.noun, set()).add(cut.tobytes())
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
    for scene in many(task, 4):
        for kind in KINDS:
            found = scene.coverage(kind)
            assert found.shape == (side, side, len(CONCEPTS[kind])) and found.dtype == np.float32
            for row, column, c in np.ndindex(found.shape):
                patch = plane(scene, kind)[
                    row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH
                ]
                assert found[row, column, c] == sum(v == c for v in patch.ravel().tolist()) / PATCH**2


# Captions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ALL_TASKS)
def test_the_caption_names_every_attribute(task):
    for scene in many(task):
        plan, words = scene.plan, scene.caption.rstrip(".").replace(",", "").split()
        assert scene.caption.endswith(".") and "{" not in scene.caption
        if plan.aerial:
            assert plan.aerial in words and "satellite" in words
            continue
        assert plan.style in words and (plan.word in words if plan.word else "word" not in words)
        for thing in plan.things:
            assert thing.noun in words
            if plan.style == "photo":
                assert f"{thing.colour} {thing.texture} {thing.noun}" in scene.caption
        if plan.style == "photo":
            assert f"on {plan.background}" in scene.caption
        else:
            assert not set(words) & (set(BACKGROUNDS) | set(TEXTURES) | set(COLOURS))


def test_a_caption_names_attributes_with_the_probability_it_is_given():
    plan = next(s.plan for s in many("words", 60) if s.plan.word and s.plan.things[0].noun not in s.plan.word)
    rng, n = np.random.default_rng(0), 3000
    captions = [caption(plan, rng, 0.35) for _ in range(n)]
    thing = plan.things[0]
    for attribute in (
        thing.colour,
        thing.texture,
        thing.noun,
        f"on {plan.background}",
        f"the word {plan.word}",
    ):
        assert sum(attribute in text for text in captions) / n == pytest.approx(0.35, abs=0.04), attribute
    assert caption(plan, np.random.default_rng(0), 1.0) == caption(plan)
    assert caption(plan, rng, 0.0) == "a photo of a scene."


def test_the_tokenizer_knows_every_word():
    from patchsae.world.pretrain import build_tokenizer

    tokenizer = build_tokenizer()
    for task in ALL_TASKS:
        texts = [s.caption for s in many(task, 40)]
        texts += [WORLD["tasks"][task]["template"].format(name) for name in class_names(task)]
        for text in texts:
            ids = tokenizer(text, truncation=task == "counting")[
                "input_ids"
            ]  # eight objects make a long caption
            assert tokenizer.unk_token_id not in ids, text
            assert ids[0] == tokenizer.bos_token_id and (
                ids[-1] == tokenizer.eos_token_id or task == "counting"
            )
            assert len(ids) <= tokenizer.model_max_length == 32, text


# Errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda: draw_scene("nowhere", 0, 0),
        lambda: class_names("nowhere"),
        lambda: SceneDataset("nowhere", "train", 3),
        lambda: SceneDataset("nouns", "val", 3),
    ],
)
def test_what_does_not_exist_is_one_sentence(call):
    with pytest.raises(ValueError) as error:
        call()
    assert one_sentence(error.value)
