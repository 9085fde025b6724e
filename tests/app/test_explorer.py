"""The explorer without a browser: what it computes, and its widget by setting traits."""

import io
import struct
import zlib
from dataclasses import replace
from urllib.parse import quote

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import LAYER, SIDE, one_sentence, random_clip_model
from matplotlib.figure import Figure
from pets import N, Pets
from PIL import Image

from patchsae import ArrayDataset
from patchsae.app.explorer import NO_TEXT, Explorer, masked_image, seen, trained_before
from patchsae.app.state import CELLS, MAX_BYTES, MAX_PIXELS, UPLOAD, State, decode_picture
from patchsae.app.widget import CHOSEN, LARGEST, NAMES, NOT_ADAPTED, ExplorerWidget
from patchsae.clip import Clip
from patchsae.data.images import Unreadable, read_image
from patchsae.masks import soft_mask
from patchsae.studies.adapt import Adapted
from patchsae.studies.names import latent_names, reference_concepts
from patchsae.world.dataset import SceneDataset


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """What is kept goes to a folder of its own."""
    monkeypatch.setattr("patchsae.config.ROOT", tmp_path)


@pytest.fixture
def explorer(clip, image_data):
    return Explorer(Pets(clip, image_data))


@pytest.fixture
def compared(clip, image_data, monkeypatch):
    """An explorer with an adapted tower: the same CLIP with slightly changed weights and two more tokens."""
    model = random_clip_model(vocabulary=len(clip.tokenizer))
    for weight in model.vision_model.parameters():
        weight.data *= 1.01

    class Tower(Clip):
        def below(self, pixels, layer):
            z = super().below(pixels, layer)
            return torch.cat([z, torch.full_like(z[:, :2], 50.0)], 1)

        def above(self, z, layer):
            assert z.shape[1] == self.n_tokens + 2
            return super().above(z[:, :self.n_tokens], layer)

    tower = Tower(model, clip.tokenizer, clip.processor)
    adapted = Adapted(tower, lambda names: tower.text_features([f"a {n}." for n in names]))
    monkeypatch.setattr("patchsae.app.explorer.trained_before", lambda study, task:
                        adapted if task == "pets" in study.profile.adaptation.tasks else None)
    return Explorer(Pets(clip, image_data))


@pytest.fixture
def widget(explorer, monkeypatch):
    monkeypatch.delenv("QUERY_STRING", raising=False)
    return ExplorerWidget(explorer)


# State and links

def test_every_state_survives_its_link():
    state = State("pets/test", 3, (0, 1, 1, 1), "words", 2, "a cat & 50% dog", 5, (1, 2, 3, 4), 7,
                  ((1, 0.0), (4, 2.5)), True, 0.25)
    for address in (state.link(), f"http://127.0.0.1:8866/?{state.link()}"):
        assert State.from_link(address) == state
    assert State().link() == "" and State.from_link("") == State()
    assert State.from_link("other=5&image=2") == State(image=2)


@pytest.mark.parametrize("link", ["image=x", "factors=3y2", "region=a_b_c_d", "threshold=much", "latent=", "image=1.5"])
def test_broken_links_are_one_sentence(link):
    if link == "latent=":  # an empty value counts as none
        assert State.from_link(link) == State()
        return
    with pytest.raises(ValueError, match="link") as error:
        State.from_link(link)
    assert one_sentence(error.value)


# Pictures

def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A png file with this size in its head."""
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def picture(mode="RGB", size=(40, 30), kind="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, 100).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("mode, kind", [("RGB", "PNG"), ("RGBA", "PNG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("P", "GIF"),
                                        ("I;16", "PNG"), ("RGB", "WEBP"), ("1", "BMP")])
def test_pictures_of_every_kind_become_rgb(mode, kind):
    image = decode_picture(picture(mode, kind=kind))
    assert image.shape == (30, 40, 3) and image.dtype == np.uint8


def test_deep_pictures_are_read_as_files_are(tmp_path):
    deep = np.linspace(0, 65535, 30 * 40).reshape(30, 40).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    image = decode_picture((tmp_path / "deep.png").read_bytes())
    assert np.array_equal(image, read_image(tmp_path / "deep.png", "deep.png"))
    assert np.array_equal(image[:, :, 0], deep >> 8)


def test_photographs_are_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_picture(picture(kind="JPEG", exif=exif)).shape == (40, 30, 3)


@pytest.mark.parametrize("data, words", [
    (b"", "cannot|not a picture"), (b"%PDF-1.7", "not a picture"), (picture()[:60], "damaged|not a picture"),
    (png(10, 10, b"nonsense"), "damaged"), (png(10_000, 10_000), "10,000 x 10,000 pixels"),
    (png(60_000, 60_000), "megapixels"), (png(1, 24_000_000), "20,000 pixels a side"),
    (b"\0" * (MAX_BYTES + 1), "8.0 MB"),
    (picture(kind="TIFF"), "not a picture"), (picture(kind="ICO"), "not a picture")])
def test_what_cannot_be_shown_is_one_sentence(data, words, recwarn):
    limit = Image.MAX_IMAGE_PIXELS
    with pytest.raises(ValueError, match=words) as error:
        decode_picture(data)
    assert one_sentence(error.value) and not len(recwarn) and Image.MAX_IMAGE_PIXELS == limit


def test_images_are_seen_as_the_model_sees_them(clip, image_data):
    large = np.asarray(Image.fromarray(image_data[3].image).resize((40, 20)))
    crops, pixels = seen(clip, [image_data[3].image, large])
    assert np.array_equal(crops[0], image_data[3].image) and np.array_equal(crops[1], clip.crop(large))
    assert torch.equal(pixels, clip.pixels([image_data[3].image, large]))


def test_masks_are_the_papers_below_no_threshold_and_black_under_one(image_data):
    image, heat = image_data[0].image, np.array([[0.0, 1.0], [2.0, 4.0]])
    assert np.array_equal(masked_image(image, heat, 0.0), soft_mask(image, heat))
    cut = masked_image(image, heat, 0.5)
    assert not cut[:8].any() and np.array_equal(cut[8:, 8:], image[8:, 8:])
    assert np.array_equal(cut[8:, :8], soft_mask(image, heat)[8:, :8])
    assert not masked_image(image, np.zeros((2, 2)), 0.0).any()


# Names

def test_concepts_of_scenes_are_counted_as_they_were_drawn(clip):
    class Stats:
        reference_rows = torch.tensor([[0, 3, 5], [2, -1, -1], [-1, -1, -1]])
        reference_labels = torch.tensor([[0, 3, 5], [2, -1, -1], [-1, -1, -1]])

    ds = SceneDataset("nouns", "train", 8)
    names, counts = reference_concepts(Stats, ds)
    for latent, rows in enumerate(([0, 3, 5], [2], [])):
        for column, name in ((names.index("cat"), "cat"), (names.index("photo (style)"), "photo")):
            kind = "noun" if name == "cat" else "style"
            assert counts[latent, column] == sum(ds.scene(row).mask(kind, name).any() for row in rows)
    assert counts.shape == (3, len(names)) and not counts[2].any()


def test_names_prefer_what_is_rare_elsewhere():
    counts = np.array([[8, 10, 0], [0, 10, 9], [0, 10, 0], [3, 4, 4], [0, 0, 0]])
    found = np.array([10, 10, 10, 10, 0])
    assert latent_names(["cat", "photo", "red"], counts, found) == ["cat", "red", "photo", "mixed", "never fires"]


# What is computed

def test_lists_agree_with_their_definitions(explorer, clip, image_data):
    h = explorer.sae.encode(clip.below(clip.pixels(image_data[2].image), LAYER))[0].detach()
    state = State("pets/test", 2, (0, 1, 1, 1))
    expected = {"patch": h[[2, 4]].mean(0), "image": h.mean(0), "class": explorer.stats.class_counts[1].float()}
    for scope, values in expected.items():
        listed = explorer.listed(replace(state, scope=scope, label=1))
        order = sorted(range(N), key=lambda s: (-values[s], s))[:12]
        assert listed["latent"].tolist() == [s for s in order if values[s] > 0]
        assert np.allclose(listed["value"], values[listed["latent"].tolist()])


def test_words_find_latents_by_what_their_references_show(explorer):
    listed = explorer.listed(State("pets/test", scope="words", query="CA"))
    shares = [share for s in range(N) for name, share, _ in explorer.label_bars(s) if name == "cat"]
    expected = sorted(shares, reverse=True)[:12]
    assert listed["value"].tolist() == pytest.approx(expected, abs=1e-5)
    full = [explorer.names[int(s)] for s, v in listed.values.tolist() if v > 0.9999]
    assert full == sorted(full, key=lambda name: name != "cat")
    assert explorer.listed(State("pets/test", scope="words", query="17"))["latent"].tolist() == [17]
    assert explorer.listed(State("pets/test", scope="words", query="unicorn")).empty
    assert explorer.listed(State("pets/test", scope="words", query="")).empty


def test_similarity_is_the_cosine_and_the_latent_itself_comes_first(explorer):
    rows = explorer.sae.W_dec.detach()
    assert torch.allclose(explorer.similarity(3), torch.cosine_similarity(rows, rows[3:4]), atol=1e-6)
    assert explorer.listed(State("pets/test", scope="similar", anchor=3))["latent"][0] == 3


def test_a_box_of_the_scatter_holds_what_lies_in_it(explorer):
    alive = [s for s in range(N) if np.isfinite(explorer.places[s]).all()]
    assert alive and all((0 <= explorer.places[s]).all() and (explorer.places[s] <= CELLS).all() for s in alive)
    top, left, bottom, right = box = (0, 0, 19, 39)
    inside = {s for s in alive if explorer.places[s][0] < bottom + 1 and explorer.places[s][1] < right + 1}
    assert set(np.flatnonzero(explorer.near(box) > 0)) == inside
    at = explorer.places[alive[0]].astype(int).tolist()
    nearest = explorer.listed(State("pets/test", scope="scatter", box=(*at, *at)))["latent"].tolist()
    assert alive[0] in nearest and len(nearest) == min(12, len(alive))


def test_changing_nothing_changes_no_bit_and_a_factor_moves_along_its_row(explorer):
    view = explorer.view("pets/test", 0)
    z, h = view.z[0], view.h[0]
    assert explorer.edited(z, h, ()) is z
    latent = int(h.sum(0).argmax())
    off = explorer.edited(z, h, ((latent, 0.0),))
    assert torch.allclose(z - off, h[:, latent, None] * explorer.sae.W_dec[latent], atol=1e-5)
    both = explorer.edited(z, h, ((latent, 0.0), ((latent + 1) % N, 3.0)))
    other = h[:, (latent + 1) % N, None] * explorer.sae.W_dec[(latent + 1) % N]
    assert torch.allclose(both - off, 2 * other, atol=1e-5)


def test_probabilities_are_those_of_the_whole_model(explorer, clip, image_data):
    table = explorer.probabilities(State("pets/test", 4))
    text = clip.text_features([f"a photo of a {name}." for name in image_data.class_names])
    logits = clip.logits(clip.above(clip.below(clip.pixels(image_data[4].image), LAYER), LAYER), text)
    assert np.allclose(table["before"], logits.softmax(1)[0].numpy(), atol=1e-6)
    assert (table["before"] == table["after"]).all()
    latent = int(explorer.view("pets/test", 4).h[0].sum(0).argmax())
    after = explorer.probabilities(State("pets/test", 4, factors=((latent, 0.0),)))
    assert (after["before"] == table["before"]).all() and not np.allclose(after["after"], table["after"])


def test_an_image_goes_through_the_model_once(explorer, clip, monkeypatch):
    calls, below = [], clip.below
    monkeypatch.setattr(clip, "below", lambda *args: calls.append(1) or below(*args))
    for state in (State("pets/test", 5), State("pets/test", 5, scope="image", mask=True, factors=((1, 0.0),))):
        explorer.listed(state), explorer.probabilities(state), explorer.heat(state)
    assert len(calls) == 1


def test_references_are_checked_and_carry_their_activation(explorer, clip, image_data):
    latent = int(explorer.n_references.argmax())
    images, heats, labels = explorer.reference_views(latent)
    row = int(explorer.stats.reference_rows[latent, 0])
    assert np.array_equal(images[0], image_data[row].image) and labels[0] == image_data[row].label
    h = explorer.sae.encode(clip.below(clip.pixels(image_data[row].image), LAYER))[0, 1:, latent]
    assert np.allclose(heats[0].ravel(), h.detach().numpy(), atol=1e-5)
    other = image_data.pixels[::-1].copy()
    explorer.references = ArrayDataset(other, image_data.labels, class_names=image_data.class_names)
    explorer.reference_views.cache_clear()
    with pytest.raises(ValueError, match="another image") as error:
        explorer.reference_views(latent)
    assert one_sentence(error.value)


def test_an_adapted_model_is_compared_without_its_prompt_tokens(compared):
    view = compared.view("pets/test", 0)
    assert view.z[1].shape[1] == view.z[0].shape[1] + 2 and view.h[1].shape == view.h[0].shape
    change = view.h[1].mean(0) - view.h[0].mean(0)
    listed = compared.listed(State("pets/test", scope="changed"))
    assert listed["latent"][0] == int(change.abs().argmax())
    assert np.allclose(listed["value"].abs(), sorted(change.abs().tolist(), reverse=True)[:len(listed)])
    table = compared.probabilities(State("pets/test", factors=((int(view.h[0].sum(0).argmax()), 0.0),)))
    assert not np.allclose(table["adapted_before"], table["before"])
    assert not np.allclose(table["adapted_before"], table["adapted_after"])
    assert "adapted_before" not in compared.probabilities(State("others/test"))
    assert compared.listed(State("others/test", scope="changed")).empty


# The widget

def test_choosing_a_patch_lists_its_latents(widget, explorer):
    widget.region = [1, 0, 1, 0]
    expected = explorer.listed(State("pets/test", widget.image, (1, 0, 1, 0)))["latent"].tolist()
    assert [row["latent"] for row in widget.rows] == expected
    assert widget.hint.startswith("Row 2, column 1: ") and "region=1_0_1_0" in widget.link


def test_hovering_says_what_is_there_and_changes_nothing_else(widget):
    before = widget.state
    widget.hover = [0, 1]
    assert widget.hint.startswith("Row 1, column 2") and widget.state == before
    widget.hover = []
    assert "Row 1, column 2" not in widget.hint or widget.region[:2] == [0, 1]


def test_mask_and_threshold_change_the_pictures(widget):
    widget.latent = widget.rows[0]["latent"]
    plain, references = widget.picture, widget.detail["references"]
    widget.mask = True
    masked = widget.picture
    assert masked != plain and widget.detail["references"] != references
    widget.threshold = 0.9
    assert widget.picture != masked
    widget.mask = False
    assert widget.picture == plain and widget.detail["references"] == references


def test_switching_a_latent_off_changes_the_probabilities_at_once(widget):
    widget.latent = widget.rows[0]["latent"]
    before = widget.probabilities
    widget.factors = [[widget.latent, 0.0]]
    assert widget.probabilities != before
    assert {row[0]: row[1][0] for row in widget.probabilities["rows"]} == {row[0]: row[1][0] for row in before["rows"]}
    widget.factors = []
    assert widget.probabilities == before


@pytest.mark.parametrize("name, value, kept", [
    ("image", 10**30, 13), ("image", -4, 0), ("latent", 999, N - 1), ("label", 7, 2), ("threshold", 3.0, 1.0),
    ("threshold", float("nan"), 0.0), ("region", [5, 1, -1, 0], [0, 0, 1, 1]), ("box", [99, 99, 0, 0], [0, 0, 39, 59]),
    ("factors", [[3, 1.0], [4, 99.0], [-5, 0.5], [6, float("nan")]], [[0, 0.5], [4, 4.0], [6, 0.0]])])
def test_values_are_kept_within_what_there_is(widget, name, value, kept):
    setattr(widget, name, value)
    assert getattr(widget, name) == kept


def test_other_data_sets_and_images(widget):
    widget.image = 13
    captions = {widget.caption}
    widget.dataset = "others/test"
    captions.add(widget.caption)
    widget.image = 3
    assert widget.link.startswith("dataset=others/test&image=3") and len(captions) >= 1


def test_uploads_are_shown_and_bad_ones_explained(widget):
    widget.upload = picture(size=(90, 60), kind="JPEG")
    assert widget.dataset == UPLOAD and "90 x 60" in widget.message[1] and widget.message[0] == ""
    assert "Labelled" not in widget.caption and widget.link == "" and widget.upload == b""
    first = widget.picture
    for data, words in ((b"nonsense", "not a picture"), (png(10_000, 10_000), "24 megapixels")):
        widget.upload = data
        assert widget.message[0] == "problem" and words in widget.message[1] and widget.picture == first
    widget.upload_size = 2 * MAX_BYTES
    assert widget.message[0] == "problem" and "16.0 MB" in widget.message[1]
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)).save(buffer, "PNG")
    widget.upload = buffer.getvalue()
    assert widget.picture != first
    widget.image = 5
    assert widget.image == 0
    widget.dataset = "pets/test"
    assert widget.message == ["", ""]


def test_limits_are_those_that_are_stated(widget):
    stated = widget.page["limits"]
    assert f"{MAX_BYTES // 2**20} MB" in stated and f"{MAX_PIXELS // 10**6} megapixels" in stated
    assert widget.page["max_bytes"] == MAX_BYTES


def test_links_open_and_broken_ones_give_the_first_state(widget, explorer):
    state = State("others/test", 3, (0, 0, 1, 0), "class", 2, "", 4, (1, 1, 2, 2), 9, ((9, 0.0),), True, 0.5)
    widget.open_link(state.link())
    assert widget.state == state and widget.message == ["", ""]
    for link in ("image=x", "dataset=nowhere/test", "dataset=pets/test&scope=nothing", "dataset=pets/test&region=1_2"):
        widget.open_link(link)
        assert widget.message[0] == "problem" and widget.state == explorer.first_state()


def test_the_address_that_voila_was_asked_for_is_opened(explorer, monkeypatch):
    monkeypatch.setenv("QUERY_STRING", "dataset=others/test&image=2")
    widget = ExplorerWidget(explorer)
    assert (widget.dataset, widget.image, widget.page["own_page"]) == ("others/test", 2, True)


def test_the_comparison_is_there_where_an_adapted_model_is(compared, clip, image_data):
    both = ExplorerWidget(compared)
    assert both.compared["towers"] == ["CLIP", "MaPLe"] == both.probabilities["towers"]
    assert "changed" in dict(both.page["scopes"]) and len(both.probabilities["rows"][0]) == 3
    both.scope = "changed"
    assert both.rows and both.meaning.startswith("Mean activation")
    both.dataset = "others/test"
    assert not both.compared and both.probabilities["towers"] == ["CLIP"]
    assert not both.rows and both.meaning == NOT_ADAPTED and one_sentence(ValueError(both.meaning))
    alone = ExplorerWidget(Explorer(Pets(clip, image_data, adapted_to=())))
    assert not alone.compared and "changed" not in dict(alone.page["scopes"])


def test_what_a_profile_does_not_have_is_said(clip, image_data, monkeypatch):
    monkeypatch.delenv("QUERY_STRING", raising=False)
    assert ExplorerWidget(Explorer(Pets(clip, image_data))).page["limits"].endswith("images of birds.")
    alone = ExplorerWidget(Explorer(Pets(clip, image_data, transfer=(), adapted_to=())))
    assert list(alone.sizes) == ["pets/test"] and "Not on this machine" not in alone.page["limits"]
    mute = ExplorerWidget(Explorer(Pets(Clip(clip.model, None, clip.processor), image_data)))
    assert mute.probabilities == {"towers": ["CLIP"], "rows": [], "note": NO_TEXT} and one_sentence(ValueError(NO_TEXT))
    assert mute.caption.startswith("Labelled ") and mute.rows and mute.detail["references"]
    mute.latent, mute.mask, mute.factors = mute.rows[-1]["latent"], True, [[mute.rows[-1]["latent"], 0]]
    assert mute.message == ["", ""] and isinstance(mute.figure(), Figure)


def test_an_adapted_model_is_not_trained_for_the_explorer(clip, image_data, monkeypatch):
    monkeypatch.setattr("patchsae.app.explorer.adapted_model", lambda recipe: f"trained on {recipe.task}")
    study, kept = Pets(clip, image_data), []
    monkeypatch.setattr("patchsae.app.explorer.kept_folder", lambda recipe: recipe.train and recipe.task in kept)
    assert trained_before(study, "pets") is None and trained_before(study, "colours") is None
    kept += ["pets", "birds"]
    assert trained_before(study, "pets") == "trained on pets" and trained_before(study, "birds") is None


def test_text_features_are_computed_once(clip, image_data, monkeypatch):
    study = Pets(clip, image_data)
    first = Explorer(study).towers("pets")[0].text
    monkeypatch.setattr(clip, "text_features", None)
    assert torch.equal(Explorer(study).towers("pets")[0].text, first)


# What a stranger sends

def message(state=None, **data) -> dict:
    """A message of a page as the kernel gets it."""
    return {"content": {"data": ({"method": "update", "state": state} if state is not None else {}) | data},
            "buffers": []}


STRANGE = (None, True, -1, 0, 10**30, 10**4000, 1.5, float("nan"), float("inf"), -1e308, "", "²", "٣", "7" * 5000,
           "\ud800", "a\0b", "<script>", UPLOAD, "nowhere/test", "others/test", "changed", [], [0], [0, 0],
           [1, -1, 10**20, 3], [[1, 2]], [[1]], [[0, 1, 2]], [["a", "b"]], [[[], {}]], [[1, None]], [[2.5, 10**400]],
           [None] * 4, {}, {"a": []}, {"state": 1}, b"", b"BM", b"\x89PNG", bytearray(9), memoryview(b"GIF89a"))


def test_nothing_that_a_stranger_sends_is_an_exception(widget, explorer, monkeypatch):
    problems = []  # ipywidgets logs an exception
    for level in ("warning", "error", "exception"):
        monkeypatch.setattr(widget.log, level, lambda *words, **_: problems.append(words))
    numbers, names = np.random.default_rng(0), [*CHOSEN, "page", "rows", "picture", "answered", "layout", "no trait"]
    sent = []
    widget.send = lambda content, buffers: sent.append(content["name"])
    for name in names:
        for value in STRANGE:
            widget._handle_msg(message({name: value}))
    for _ in range(150):
        some = numbers.choice(len(names), 4, replace=False)
        widget._handle_msg(message({names[i]: STRANGE[numbers.integers(len(STRANGE))] for i in some}))
    for value in STRANGE:
        for strange in (message(state=value), message(method=value), message({"image": 1}, buffer_paths=value),
                        message(method="custom", content=value), message(method="custom", content={"kind": value}),
                        {"content": {"data": value}, "buffers": []}, {"content": {}, "buffers": []}):
            widget._handle_msg(strange)
    assert widget.page == widget._page() and widget.answered <= LARGEST and not sent
    assert widget.state.dataset in widget.sizes and widget.link.isascii()
    widget._handle_msg(message({"dataset": "pets/test", "image": 3, "latent": 2, "asked": 7}))
    assert (widget.state.dataset, widget.image, widget.latent, widget.answered) == ("pets/test", 3, 2, 7)
    widget._handle_msg(message(method="custom", content={"kind": "latents"}))
    assert sent == ["explorer_latents.csv"]
    assert not problems


@pytest.mark.parametrize("query", ["²", "٣", "7" * 5000, "\ud800", "³ cat", "c" * 5000, "\0"])
def test_strange_queries_are_answered(widget, query):
    widget.scope = "words"
    widget.query = query
    widget.open_link(f"dataset=pets/test&scope=words&query={quote(query, errors='replace')}")
    assert len(widget.query) <= 200 and widget.message == ["", ""]


def test_strange_links_are_one_sentence_or_a_state(widget, explorer):
    numbers = np.random.default_rng(1)
    values = ["", "x", "²", "7" * 5000, "-5", "1e999", "nan", "1_2_3_4", "9_9", "0x0", "3x0_4xnan", "1xx2", UPLOAD]
    for _ in range(150):
        fields = numbers.choice(NAMES, 3, replace=False)
        widget.open_link("&".join(f"{name}={quote(values[numbers.integers(len(values))])}" for name in fields))
        assert widget.message == ["", ""] or one_sentence(ValueError(widget.message[1]))
        assert widget.state.dataset in explorer.datasets


def test_images_that_cannot_be_read_are_said(widget, explorer, monkeypatch):
    def broken(*_):
        raise Unreadable("Cannot read the image a.png (cut); replace or remove it.")

    monkeypatch.setattr("patchsae.app.explorer.seen", broken)
    for name, value in (("image", 5), ("hover", [0, 0]), ("dataset", "others/test")):
        setattr(widget, name, value)
        assert widget.message == ["problem", "Cannot read the image a.png (cut); replace or remove it."]


def test_files_to_keep(widget, monkeypatch):
    sent = []
    monkeypatch.setattr(widget, "send", lambda content, buffers: sent.append((content, buffers[0])))
    for kind in ("figure", "latents", "probabilities"):
        widget._handle_custom_msg({"kind": kind}, [])
    names = [content["name"] for content, _ in sent]
    assert names == ["explorer_figure.png", "explorer_latents.csv", "explorer_probabilities.csv"]
    assert sent[0][1].startswith(b"\x89PNG")
    table = pd.read_csv(io.BytesIO(sent[1][1]))
    assert table["latent"].tolist() == [row["latent"] for row in widget.rows]
    assert {"name", "value", "factor", "frequency", "label_entropy"} <= set(table)
    assert pd.read_csv(io.BytesIO(sent[2][1]))["before"].sum() == pytest.approx(1, abs=1e-4)
    assert isinstance(widget.figure(), Figure)
