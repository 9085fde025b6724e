"""Tasks of known truth: classes show what their table says, nothing else tells them, and names are words apart."""

import json
from collections import Counter

import numpy as np
import pytest
import torch

from patchsae.config import ROOT
from patchsae.world.pretrain import build_tokenizer
from patchsae.world.probes import fit_readout
from patchsae.world.scenes import CONCEPTS, KINDS, TRUTHS, WORLD, class_names, draw_scene

TASKS = WORLD["tasks"]
ARRANGED = [task for task in TRUTHS if "quarters" in TASKS[task]]
SHOWN = [task for task in TRUTHS if "shows" in TASKS[task]]


def test_there_are_tasks_of_every_truth():
    count = Counter(TRUTHS.values())
    assert len(TRUTHS) >= 12 and count["remap"] >= 5 and count["new"] >= 3 and count["mixed"] >= 2


@pytest.mark.parametrize("task", TRUTHS)
def test_classes_are_even_and_equally_often(task):
    names = class_names(task)
    assert len(names) >= 4 and len(names) % 2 == 0 and len(set(names)) == len(names)
    assert [draw_scene(task, 0, i).label for i in range(len(names))] == list(range(len(names)))


@pytest.mark.parametrize("task", SHOWN)
def test_the_main_object_shows_what_the_class_is_said_to_show(task):
    table, arrangements = TASKS[task], len(TASKS[task].get("quarters", [""]))
    assert len(table["shows"]) * arrangements == len(class_names(task))
    shown = [value for values in table["shows"] for value in values]
    assert len(set(shown)) == len(shown) and set(shown) <= set(CONCEPTS[table["kind"]])
    seen = set()
    for i in range(200):
        scene = draw_scene(task, 5, i)
        value = getattr(scene.plan.things[0], table["kind"])
        assert value in table["shows"][scene.label // arrangements]
        assert scene.mask(table["kind"], value).any()
        seen.add(value)
        if arrangements == 1:
            larger, smaller = scene.plan.things
            assert larger.side > smaller.side
        else:
            assert len({thing.noun for thing in scene.plan.things}) == 1
    assert len(seen) > 0.8 * len(shown)


@pytest.mark.parametrize("task", ARRANGED)
def test_quarters_are_arranged_as_the_class_says(task):
    table = TASKS[task]
    for i in range(100):
        scene = draw_scene(task, 6, i)
        values = table["quarters"][scene.label % len(table["quarters"])]
        assert [getattr(thing, table["among"]) for thing in scene.plan.things] == values
        for place, thing in enumerate(scene.plan.things):
            for edge in (0, thing.side - 1):
                assert ((thing.left + edge) // 32, (thing.top + edge) // 32) == (place % 2, place // 2)
    for half in (table["quarters"][:2], table["quarters"][2:]):  # the same things at other places
        assert len({tuple(sorted(values)) for values in half}) == 1 and half[0] != half[1]


def test_parts_are_the_classes_of_other_tasks():
    table = TASKS["words_or_rows"]
    for i in range(40):
        plan = draw_scene("words_or_rows", 0, i).plan
        part, label = table["parts"][plan.label]
        if part == "new_words":
            assert [plan.things[0].noun] == TASKS[part]["shows"][label]
        else:
            assert [thing.colour for thing in plan.things] == TASKS[part]["quarters"][label]
    for half in (table["parts"][:4], table["parts"][4:]):  # both kinds of class in either half
        assert Counter(part for part, _ in half) == {"new_words": 2, "colour_rows": 2}


def areas(task, n, seed):
    """Pixels of every concept of every kind in each scene, ``[n,K]``, and the labels."""
    scenes = [draw_scene(task, seed, i) for i in range(n)]
    counts = [np.concatenate([np.bincount(scene.maps[k].ravel() + 1, minlength=len(CONCEPTS[kind]) + 1)
                              for k, kind in enumerate(KINDS)]) for scene in scenes]
    return torch.from_numpy(np.array(counts)).float(), torch.tensor([scene.label for scene in scenes])


@pytest.mark.parametrize("task", [task for task in TRUTHS if TRUTHS[task] == "new"])
def test_nothing_but_the_arrangement_tells_the_class_of_a_new_task(task):
    """A readout that is told how many pixels every colour, noun, texture and background has guesses."""
    (x, labels), (x_test, labels_test) = areas(task, 1600, 0), areas(task, 800, 1)
    right = fit_readout(x, labels, 1e-2)(x_test).argmax(1) == labels_test
    assert abs(right.float().mean() - 0.25) < 0.05  # three deviations of 800 guesses


def test_and_it_tells_the_class_of_a_remapped_one():
    (x, labels), (x_test, labels_test) = areas("colour_words", 800, 0), areas("colour_words", 400, 1)
    right = fit_readout(x, labels, 1e-2)(x_test).argmax(1) == labels_test
    assert right.float().mean() > 0.8


def test_names_are_words_of_the_committed_tokenizer_and_change_nothing_of_it():
    committed = json.loads((ROOT / "data/mini/clip/tokenizer.json").read_text())["model"]["vocab"]
    tokenizer = build_tokenizer()
    assert tokenizer.get_vocab() == committed
    for task in TRUTHS:
        ids = [tuple(tokenizer(TASKS[task]["template"].format(name))["input_ids"]) for name in class_names(task)]
        assert len(set(ids)) == len(ids) and not any(tokenizer.unk_token_id in row for row in ids)
    assert tokenizer("blick")["input_ids"] == tokenizer("dax")["input_ids"]  # why new names are not new words


def test_new_names_were_never_trained():
    """Neither a concept that pre-training shows nor a word of its phrases."""
    from patchsae.data.datasets import TEMPLATES
    from patchsae.world.pretrain import PHRASES, SEEN

    texts = [*TEMPLATES["imagenet_ensemble_80"], *PHRASES.values(), *sum(SEEN.values(), ())]
    trained = {word for text in texts for word in text.replace("{}", " ").replace(".", " ").split()}
    for task in ("new_words", "groups", "bags", "new_colours", "words_or_rows"):
        assert not trained & set(class_names(task))


@pytest.mark.parametrize("task", ["noun_cycle", "colour_cycle"])
def test_a_cycle_leaves_some_classes_of_each_half_and_moves_the_others_round(task):
    names, shows = class_names(task), [value for [value] in TASKS[task]["shows"]]
    for half in (slice(len(names) // 2), slice(len(names) // 2, None)):
        assert sorted(names[half]) == sorted(shows[half])
        moved = [name for name, value in zip(names[half], shows[half]) if name != value]
        assert 2 * len(moved) >= len(names[half]) and len(moved) < len(names[half])
