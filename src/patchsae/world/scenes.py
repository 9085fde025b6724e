"""The pictogram world: small scenes with captions, labels and per-pixel ground truth.

A scene is a pure function of (task, seed, index): integers from a counter-seeded generator decide what is in
it, and integer arithmetic draws it, so that every machine draws the same bytes. Objects are glyphs of the
Material Design Icons font; the tables of nouns, colours and tasks are in ``scenes.toml``.
"""

import functools
import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from patchsae.data.images import patch_shares

WORLD = tomllib.loads(Path(__file__).with_name("scenes.toml").read_text())
SIZE, PATCH, NAMES = WORLD["size"], WORLD["patch"], WORLD["names"]
GLYPHS = {noun: glyph for group in WORLD["nouns"].values() for noun, glyph in group.items()}
NOUNS, COLOURS = tuple(GLYPHS), tuple(WORLD["colours"])
GROUPS = {noun: group for group, nouns in WORLD["nouns"].items() for noun in nouns}
TEXTURES = (*NAMES["textures"], *NAMES["more_textures"])
BACKGROUNDS = (*NAMES["backgrounds"], *NAMES["more_backgrounds"])
#: Task -> "remap", "new" or "mixed", of the tasks whose truth is known; TASKS are the others, without pre-training.
TRUTHS = {task: table["truth"] for task, table in WORLD["tasks"].items() if "truth" in table}
TASKS = tuple(task for task in WORLD["tasks"] if task not in TRUTHS and task != "pretraining")
#: Tasks whose classes are nouns, with the share of sketches in them; their scenes may have two objects.
NOUN_TASKS = {"nouns": 0.125, "sketches": 1.0, "pretraining": 0.25}
#: The kinds of concept, in the order of the planes of ``Scene.maps``, and the concepts of each kind.
CONCEPTS = {"noun": NOUNS, "colour": COLOURS, "texture": TEXTURES, "background": BACKGROUNDS,
            "style": tuple(NAMES["styles"]), "text": tuple(NAMES["words"])}
KINDS = tuple(CONCEPTS)
#: Class names of the tasks, in the order of their labels.
CLASS_NAMES = dict.fromkeys(NOUN_TASKS, NOUNS) | {
    "textures": TEXTURES, "backgrounds": BACKGROUNDS, "colours": COLOURS, "words": CONCEPTS["text"],
    "counting": tuple(NAMES["counts"]), "aerial": tuple(NAMES["aerial"]),
    "pairs": tuple(f"{colour} {noun}" for noun in NAMES["pair_nouns"] for colour in NAMES["pair_colours"])
} | {task: tuple(WORLD["tasks"][task]["names"]) for task in TRUTHS}
NONE = -1
#: Raised whenever a drawn byte changes: what was computed of the scenes before is then of others.
VERSION = 1
_Y, _X = np.mgrid[:SIZE, :SIZE]


@dataclass(frozen=True)
class Thing:
    """One object: what it is and the square it fills, in pixels (left, top, side)."""

    noun: str
    colour: str
    texture: str
    side: int
    left: int
    top: int


@dataclass(frozen=True)
class Plan:
    """What is in a scene, before it is drawn. ``aerial`` names a tile of the far domain instead."""

    things: tuple[Thing, ...] = ()
    background: str = "sky"
    style: str = "photo"
    word: str = ""
    word_at: tuple[int, int] = (0, 0)
    aerial: str = ""
    label: int = 0


@dataclass(frozen=True)
class Scene:
    """A drawn scene.

    ``image``: uint8 ``[64, 64, 3]``; ``label``: index into the task's class names; ``maps``: int8
    ``[6, 64, 64]``, one plane a kind of concept (``KINDS``), each pixel the index of its concept or -1.
    """

    image: np.ndarray
    label: int
    maps: np.ndarray
    plan: Plan = field(repr=False)

    def mask(self, kind: str, name: str) -> np.ndarray:
        """Where the concept is: bool ``[64, 64]``."""
        return self.maps[KINDS.index(kind)] == CONCEPTS[kind].index(name)

    def coverage(self, kind: str) -> np.ndarray:
        """Share of each patch that each concept of a kind covers: float32 ``[8, 8, concepts]``."""
        return patch_shares(self.maps[KINDS.index(kind)], len(CONCEPTS[kind]), SIZE // PATCH)


def class_names(task: str) -> tuple[str, ...]:
    """Class names of a task, in label order."""
    if task not in CLASS_NAMES:
        raise ValueError(f"There is no task {task!r} in the pictogram world; choose one of {', '.join(TASKS)}.")
    return CLASS_NAMES[task]


def draw_scene(task: str, seed: int, index: int) -> Scene:
    """Draw scene ``index`` of a task. Labels go round in turn, so that any run of scenes is balanced."""
    names = class_names(task)
    rng = np.random.default_rng([seed, index, list(WORLD["tasks"]).index(task)])
    return render(plan_scene(task, index % len(names), rng), rng)


def plan_scene(task: str, label: int, rng: np.random.Generator) -> Plan:
    """Decide what is in a scene of this task and class."""
    name = class_names(task)[label]
    if task in TRUTHS:
        return replace(_plan_of_known_truth(WORLD["tasks"][task], label, rng), label=label)
    if task == "aerial":
        return Plan(aerial=name, label=label)
    if task == "counting":
        plan, cells, noun = _backdrop(rng), rng.permutation(16)[:label + 1], _pick(rng, NOUNS)
        places = [{"left": 16 * int(cell % 4), "top": 16 * int(cell // 4)} for cell in cells]
        crowd = tuple(replace(_random_thing(rng), noun=noun, side=16, **place) for place in places)
        return replace(plan, things=crowd, label=label)
    plan = _backdrop(rng, style="sketch" if rng.random() < NOUN_TASKS.get(task, 0.0) else "photo")
    first = _random_thing(rng)
    if task in NOUN_TASKS:
        first = replace(first, noun=name)
    elif task == "pairs":
        first = replace(first, **dict(zip(("colour", "noun"), name.split())))
    elif task in ("textures", "colours"):
        first = replace(first, **{task[:-1]: name})
    elif task == "backgrounds":
        plan = replace(plan, background=name)
    things = _placed(rng, first, two=task in NOUN_TASKS)
    if task == "words" or rng.random() < WORLD["text_share"] and task != "textures":
        plan = replace(plan, word=name if task == "words" else _pick(rng, NAMES["words"]),
                       word_at=(_lattice(rng, 32), _pick(rng, (0, 4, 48, 52))))
    return replace(plan, things=things, label=label)


def _pick(rng, names):
    """One of the names, each equally likely."""
    return names[int(rng.integers(len(names)))]


def _backdrop(rng, style="photo") -> Plan:
    return Plan(background=_pick(rng, NAMES["backgrounds"]), style=style)


def _random_thing(rng) -> Thing:
    """An object seen in pre-training, not yet placed."""
    return Thing(_pick(rng, NOUNS), _pick(rng, COLOURS), _pick(rng, NAMES["textures"]), 0, 0, 0)


def _lattice(rng, slack: int) -> int:
    """A position on the 4-pixel lattice in [0, slack]."""
    return 4 * int(rng.integers(0, slack // 4 + 1))


def _placed(rng, first: Thing, two: bool) -> tuple[Thing, ...]:
    """One object anywhere, or a larger and a smaller one side by side that do not overlap."""
    if not two or rng.random() >= WORLD["two_share"]:
        side = _pick(rng, (32, 40, 48))
        return (replace(first, side=side, left=_lattice(rng, SIZE - side), top=_lattice(rng, SIZE - side)),)
    return _pair(rng, first)


def _pair(rng, first: Thing) -> tuple[Thing, ...]:
    """A larger object and a smaller, random one side by side, which do not overlap."""
    large, small = _pick(rng, (32, 40)), 24
    start = _lattice(rng, SIZE - large - small)
    along = [start, start + large] if rng.random() < 0.5 else [start + small, start]
    across = [_lattice(rng, SIZE - large), _lattice(rng, SIZE - small)]
    lefts, tops = (along, across) if rng.random() < 0.5 else (across, along)
    return (replace(first, side=large, left=lefts[0], top=tops[0]),
            replace(_random_thing(rng), side=small, left=lefts[1], top=tops[1]))


def _plan_of_known_truth(task: dict, label: int, rng) -> Plan:
    """A scene of a task whose table in ``scenes.toml`` says its truth; the label is left to the caller.

    ``shows``: for each class the concepts of ``kind`` that its main object may have; beside it is a smaller, random
    one. ``quarters``: for each class what the small object in each quarter of the scene has of the kind ``among``; with
    both, a class for each pair. ``parts``: for each class one of another task. All else is independent of the class.
    """
    if "parts" in task:
        part, other = task["parts"][label]
        return _plan_of_known_truth(WORLD["tasks"][part], other, rng)
    if "quarters" not in task:
        main = replace(_random_thing(rng), **{task["kind"]: _pick(rng, task["shows"][label])})
        return replace(_backdrop(rng), things=_pair(rng, main))
    group, arrangement = divmod(label, len(task["quarters"]))
    shown = {task["kind"]: _pick(rng, task["shows"][group])} if "shows" in task else {}
    return replace(_backdrop(rng), things=tuple(
        replace(_random_thing(rng), **shown, **{task["among"]: value}, side=16,
                left=32 * (i % 2) + _lattice(rng, 16), top=32 * (i // 2) + _lattice(rng, 16))
        for i, value in enumerate(task["quarters"][arrangement])))


def caption(plan: Plan, rng: np.random.Generator | None = None, keep: float = 1.0) -> str:
    """Describe a plan. With ``rng`` each attribute is named with probability ``keep`` only."""
    def named(*texts):
        return [text for text in texts if text and (rng is None or rng.random() < keep)]

    if plan.aerial:
        return f"a satellite photo of {plan.aerial}."
    phrases, photo = [], plan.style == "photo"
    for thing in plan.things:
        adjectives, noun = named(*([thing.colour, thing.texture] if photo else [])), named(thing.noun)
        if noun or adjectives:
            phrases.append(" ".join(["a", *adjectives, *(noun or ["object"])]))
    around = named(f"on {plan.background}" if photo else "", f"with the word {plan.word}" if plan.word else "")
    return " ".join([f"a {plan.style} of", " and ".join(phrases) or "a scene", *around]) + "."


# Drawing ------------------------------------------------------------------------------------------------

_PATTERNS = {
    "plain": np.zeros((SIZE, SIZE), bool),
    "striped": _Y // 2 % 2 == 1,
    "dotted": (_X % 4 // 2 == 1) & (_Y % 4 // 2 == 1),
    "checkered": (_X // 4 + _Y // 4) % 2 == 1,
    "vertical": _X // 2 % 2 == 1,
    "diagonal": (_X + _Y) // 2 % 2 == 1,
    "grid": (_X % 4 == 0) | (_Y % 4 == 0),
    "zigzag": (_Y + abs(_X % 8 - 4)) // 2 % 2 == 1,
    "woven": (_X // 2 + _Y // 4) % 2 == 1,
    "crossed": ((_X + _Y) % 6 == 0) | ((_X - _Y) % 6 == 0),
}
# Per background: base colour, second colour, where the second colour goes, grain of the noise.
_GROUNDS = {
    "sky": ((150, 195, 240), (200, 222, 246), _Y * 3 // SIZE % 2 == 1, 6),
    "grass": ((96, 150, 74), (80, 128, 60), (_X * 7 + _Y * 3) % 5 == 0, 16),
    "sand": ((222, 196, 148), (200, 170, 120), (_X * 5 + _Y * 11) % 13 == 0, 12),
    "water": ((50, 110, 160), (90, 150, 190), (_Y + _X // 4 % 2) % 6 == 0, 8),
    "brick": ((150, 82, 66), (190, 180, 170), (_Y % 6 == 0) | ((_X + _Y // 6 % 2 * 5) % 10 == 0), 8),
    "night": ((22, 24, 48), (230, 230, 200), (_X * 13 + _Y * 29) % 61 == 0, 6),
    "snow": ((232, 238, 246), (205, 216, 232), (_X * 3 + _Y * 5) % 17 == 0, 5),
    "wood": ((140, 100, 60), (112, 76, 44), (_X % 9 == 0) | ((_X + _Y // 9) % 4 == 0), 8),
    "tiles": ((196, 206, 200), (140, 160, 156), (_X % 16 == 0) | (_Y % 16 == 0), 4),
    "hay": ((206, 172, 70), (170, 132, 48), (_X * 2 + _Y) % 7 < 2, 18),
}


@functools.cache
def _glyph(noun: str, side: int) -> np.ndarray:
    """The filled shape of a noun: bool ``[side, side]``."""
    import fonticon_mdi7  # the font takes a while to load, and most of this package draws nothing

    font = ImageFont.truetype(fonticon_mdi7.MDI7.__font_file__, side, layout_engine=ImageFont.Layout.BASIC)
    canvas = Image.new("L", (side, side))
    code = getattr(fonticon_mdi7.MDI7, GLYPHS[noun]).split(".")[-1]
    ImageDraw.Draw(canvas).text((side // 2, side // 2), code, fill=255, font=font, anchor="mm")
    return np.asarray(canvas) > 127


@functools.cache
def _sign(word: str) -> np.ndarray:
    """A word in black on a white plate: uint8 ``[12, width]``."""
    font = ImageFont.load_default(12)
    width = int(font.getlength(word.upper())) + 4
    canvas = Image.new("L", (width, 12), 250)
    ImageDraw.Draw(canvas).text((width // 2, 6), word.upper(), fill=15, font=font, anchor="mm")
    return np.asarray(canvas)


def _noise(rng, grain: int) -> np.ndarray:
    return rng.integers(-grain, grain + 1, (SIZE, SIZE, 1), dtype=np.int16)


def render(plan: Plan, rng: np.random.Generator) -> Scene:
    """Draw a plan; the generator gives the grain and the shade."""
    maps = np.full((len(KINDS), SIZE, SIZE), NONE, np.int8)
    if plan.aerial:
        canvas = _aerial(plan.aerial, rng)
    else:
        photo = plan.style == "photo"
        canvas, plane = _ground(plan.background if photo else "", rng), dict(zip(KINDS, maps))
        plane["style"][:] = CONCEPTS["style"].index(plan.style)
        if photo:
            plane["background"][:] = BACKGROUNDS.index(plan.background)
        for thing in plan.things:
            _draw_thing(canvas, plane, thing, photo, rng)
        if plan.word:
            _draw_word(canvas, plane, plan)
    return Scene(canvas.clip(0, 255).astype(np.uint8), plan.label, maps, plan)


def _ground(background: str, rng) -> np.ndarray:
    """A background, or paper: int16 ``[64, 64, 3]``."""
    if not background:
        return np.full((SIZE, SIZE, 3), (244, 241, 232), np.int16) + _noise(rng, 4)
    base, second, where, grain = _GROUNDS[background]
    # Shifting the pattern keeps a patch from recognising a background by one fixed arrangement of pixels.
    where = np.roll(where, tuple(rng.integers(0, 8, 2)), (0, 1))
    canvas = np.where(where[..., None], np.array(second, np.int16), np.array(base, np.int16))
    return canvas + _noise(rng, grain)


def _draw_thing(canvas, plane: dict, thing: Thing, photo: bool, rng) -> None:
    """Paint one object and its masks. Sketches have an outline and no colour, texture or background."""
    region = slice(thing.top, thing.top + thing.side), slice(thing.left, thing.left + thing.side)
    shape = _glyph(thing.noun, thing.side)
    shade = rng.integers(-12, 13, 3, dtype=np.int16)
    if photo:
        colour = np.array(WORLD["colours"][thing.colour], np.int16) + shade
        dark = _PATTERNS[thing.texture][region][shape]
        canvas[region][shape] = np.where(dark[:, None], colour * 9 // 20, colour)
    else:
        canvas[region][shape & ~ndimage.binary_erosion(shape)] = 60 + shade[0]
    for kind in ("noun", "colour", "texture") if photo else ("noun",):
        plane[kind][region][shape] = CONCEPTS[kind].index(getattr(thing, kind))
    plane["background"][region][shape] = NONE


def _draw_word(canvas, plane: dict, plan: Plan) -> None:
    """Put the sign on top of everything; what it covers is no longer there."""
    sign = _sign(plan.word)
    left, top = min(plan.word_at[0], SIZE - sign.shape[1]), min(plan.word_at[1], SIZE - len(sign))
    region = slice(top, top + len(sign)), slice(left, left + sign.shape[1])
    canvas[region] = sign[..., None]
    for kind in ("noun", "colour", "texture", "background"):
        plane[kind][region] = NONE
    plane["text"][region] = CONCEPTS["text"].index(plan.word)


def _aerial(name: str, rng) -> np.ndarray:
    """One tile of the far domain, seen from above: int16 ``[64, 64, 3]``."""
    x, y = (_X, _Y) if rng.random() < 0.5 else (_Y, _X)
    a, b, c = (int(v) for v in rng.integers(0, 16, 3))
    winding = abs((y + 4 * a) % 32 - 16)
    land, water = (112, 138, 84), (38, 70, 96)
    blobs = rng.integers(0, 4, (SIZE // 4, SIZE // 4)).repeat(4, 0).repeat(4, 1)
    roofs = (x % (8 + a % 4) < 5) & (y % (9 + b % 4) < 4) & (blobs > 0)
    layers = {
        "crops": (((x + a) // (5 + b % 5) % 3 == 0, (196, 178, 96)), ((x + a) // (5 + b % 5) % 3 == 1, (92, 142, 60))),
        "forest": ((blobs >= 0, (40, 78, 44)), (blobs == 3, (26, 56, 32))),
        "river": ((abs(x - 16 - b - winding) < 5, water),),
        "highway": ((abs(x - 20 - b) < 6, (120, 120, 122)), ((abs(x - 20 - b) < 1) & (y % 8 < 4), (230, 230, 220))),
        "village": ((roofs, (176, 92, 70)), (abs(y - 24 - c) < 2, (150, 150, 146))),
        "lake": (((x - 24 - a) ** 2 + (y - 24 - b) ** 2 < (14 + c // 2) ** 2, water),),
        "orchard": ((x >= 0, (170, 150, 104)), ((x % 6 - 3) ** 2 + (y % 6 - 3) ** 2 < 5, (58, 98, 48))),
        "harbour": ((x > 16 + a, water), ((x > 16 + a) & (x < 44 + b) & (y % 12 < 3), (168, 164, 158))),
    }
    canvas = np.full((SIZE, SIZE, 3), land, np.int16)
    for where, colour in layers[name]:
        canvas[where] = colour
    return canvas + _noise(rng, 10)
