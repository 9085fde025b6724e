"""One streaming pass against a loop over images and latents that keeps everything in memory."""

import math

import numpy as np
import pytest
import torch
from conftest import LAYER, SIDE, WIDTH, one_sentence, random_clip_model, random_sae, refused
from test_images import folder
from test_processes import launch

from patchsae import ArrayDataset, SparseAutoencoder, collect_latents
from patchsae.clip import Clip
from patchsae.fast import encoder, onednn
from patchsae.latents import LatentStatistics, Question, collect_many, saved_latents
from patchsae.maple import new_maple

FIELDS = ("frequency", "mean_activation", "label_entropy", "label_std", "reference_values", "class_counts")


class Exact(Clip):
    """A model whose tokens are the image's own numbers, so that small integers stay exact: 5 of width 12."""

    def below(self, pixels, layer):
        return pixels[:, :, :5, :4].permute(0, 2, 1, 3).reshape(len(pixels), 5, WIDTH)


class Prompted(Clip):
    """A model with two more tokens at the end, loud ones, as an adapted tower has."""

    def below(self, pixels, layer):
        z = super().below(pixels, layer)
        return torch.cat([z, 50 * torch.ones_like(z[:, :2])], 1)


@pytest.fixture(scope="module")
def exact():
    return Exact(random_clip_model())


def latents_of(clip, sae, ds, layer=LAYER):
    """h [T,S] of every image, one image at a time."""
    images = []
    with torch.no_grad():
        for i in range(len(ds)):
            z = clip.below(torch.as_tensor(ds[i].image)[None], layer)[0, :5]
            images.append(torch.relu((z - sae.b_dec) @ sae.W_enc + sae.b_enc).double().numpy())
    return images


def naive(images, labels, ids, n_classes, tau, k):
    """Every statistic by its definition, one latent after the other."""
    s = images[0].shape[1]
    out = {
        "frequency": [],
        "mean_activation": [],
        "label_entropy": [],
        "label_std": [],
        "reference_ids": [],
        "reference_rows": [],
        "reference_labels": [],
        "reference_values": [],
        "class_counts": np.zeros((n_classes, s)),
    }
    for j in range(s):
        strength = [sum(h[:, j]) / len(h) for h in images]
        on = [i for i, h in enumerate(images) if any(value > 0 for value in h[:, j])]
        out["frequency"].append(len(on) / len(images))
        out["mean_activation"].append(sum(strength[i] for i in on) / len(on) if on else math.nan)
        best = sorted(on, key=lambda i: (-strength[i], i))[:k]
        missing = k - len(best)
        out["reference_rows"].append(best + [-1] * missing)
        out["reference_ids"].append([ids[i] for i in best] + [""] * missing)
        out["reference_labels"].append([labels[i] for i in best] + [-1] * missing)
        out["reference_values"].append([strength[i] for i in best] + [0.0] * missing)
        if len(best) < min(10, k):
            out["label_entropy"].append(math.nan)
            out["label_std"].append(math.nan)
        else:
            total, entropy = sum(strength[i] for i in best), 0.0
            for c in range(n_classes):
                p = sum(strength[i] for i in best if labels[i] == c) / total
                entropy -= p * math.log(p) if p > 0 else 0.0
            out["label_entropy"].append(entropy)
            mean = sum(labels[i] for i in best) / len(best)
            out["label_std"].append(math.sqrt(sum((labels[i] - mean) ** 2 for i in best) / len(best)))
        for i, h in enumerate(images):
            out["class_counts"][labels[i], j] += sum(1 for value in h[:, j] if value > tau)
    return {name: np.array(value) for name, value in out.items()}


def compare(found, expected, rtol=1e-5, atol=1e-6):
    for name in FIELDS:
        value = getattr(found, name)
        assert tuple(value.shape) == expected[name].shape, name
        np.testing.assert_allclose(
            np.asarray(value, dtype=np.float64), expected[name], rtol=rtol, atol=atol, err_msg=name
        )
    for name in ("reference_ids", "reference_rows", "reference_labels"):
        np.testing.assert_array_equal(np.asarray(getattr(found, name)), expected[name], err_msg=name)


def some_data(n, classes, seed=0):
    rng = np.random.default_rng(seed)
    return ArrayDataset(
        torch.from_numpy(rng.normal(size=(n, 3, SIDE, SIDE)).astype(np.float32)),
        rng.integers(0, classes, n),
        class_names=[f"class {c}" for c in range(classes)],
    )


def quiet_sae(seed=0):
    """20 latents: one dead, one on everywhere, the others rare to frequent."""
    sae = random_sae(WIDTH, 20, seed)
    with torch.no_grad():
        sae.b_enc += torch.linspace(-4, 1.5, 20)
        sae.b_enc[3], sae.b_enc[7] = -1e4, 40
    return sae


@pytest.mark.parametrize("n, k", [(40, 10), (40, 3), (40, 12), (12, 10), (9, 10), (1, 10), (40, 1), (40, 64)])
def test_every_statistic_equals_the_loop(clip, n, k):
    ds, sae, tau = some_data(n, 4), quiet_sae(), 0.2
    images = latents_of(clip, sae, ds)
    assert min(abs(h - tau).min() for h in images) > 1e-6, "a token this close to tau may round either way"
    expected = naive(images, ds.labels.tolist(), [ds[i].id for i in range(n)], 4, tau, k)
    found = collect_latents(clip, sae, ds, LAYER, tau=tau, n_reference=k)
    compare(found, expected)
    assert found.n_images == n and found.tau == tau and found.sae_hash == sae.fingerprint()
    if n == 40:
        assert np.isfinite(expected["label_entropy"]).sum() > 3
        assert len(set(expected["frequency"])) > 5


def test_defaults(clip):
    ds, sae = some_data(30, 3), quiet_sae()
    compare(
        collect_latents(clip, sae, ds, LAYER),
        naive(latents_of(clip, sae, ds), ds.labels.tolist(), [ds[i].id for i in range(30)], 3, 0.2, 10),
    )


@pytest.mark.parametrize("batch", [1, 3, 7, 40])
def test_batch_size_does_not_matter(clip, batch):
    ds, sae = some_data(40, 4), quiet_sae()
    one, other = (
        collect_latents(clip, sae, ds, LAYER),
        collect_latents(clip, sae, ds, LAYER, batch_images=batch),
    )
    for name in FIELDS:
        torch.testing.assert_close(
            getattr(one, name), getattr(other, name), rtol=1e-5, atol=1e-6, equal_nan=True
        )
    assert torch.equal(one.class_counts, other.class_counts) and torch.equal(one.frequency, other.frequency)
    np.testing.assert_array_equal(one.reference_ids, other.reference_ids)


def test_layer_is_respected(clip):
    ds, sae = some_data(12, 2), quiet_sae()
    for layer in (0, 2, -1):
        expected = naive(
            latents_of(clip, sae, ds, layer), ds.labels.tolist(), [ds[i].id for i in range(12)], 2, 0.2, 10
        )
        compare(collect_latents(clip, sae, ds, layer), expected)


def test_dead_and_always_on_latents(clip):
    found = collect_latents(clip, quiet_sae(), some_data(37, 4), LAYER)
    assert found.frequency[7].item() == 1.0 and found.frequency[3].item() == 0.0
    assert found.class_counts[:, 7].sum() == 37 * 5 and not found.class_counts[:, 3].any()
    for name in ("mean_activation", "label_entropy", "label_std"):
        assert math.isnan(getattr(found, name)[3])
    assert list(found.reference_ids[3]) == [""] * 10 and not found.reference_values[3].any()
    assert set(found.reference_rows[3].tolist()) == {-1} == set(found.reference_labels[3].tolist())


def integers(rows):
    """Images from lists of 60 whole numbers."""
    pixels = torch.zeros(len(rows), 3, SIDE, SIDE)
    pixels[:, :, :5, :4] = torch.tensor(rows, dtype=torch.float32).view(len(rows), 3, 5, 4)
    return pixels


def whole_sae(columns=8):
    """Integer weights: latent 2j is coordinate j, latent 2j+1 its negative."""
    sae = SparseAutoencoder(WIDTH, columns)
    with torch.no_grad():
        sae.W_enc.zero_()
        for j in range(columns):
            sae.W_enc[j // 2, j] = 1.0 if j % 2 == 0 else -1.0
    return sae


@pytest.mark.parametrize("batch", [1, 2, 5, 64])
@pytest.mark.parametrize("k", [1, 3, 10, 11])
def test_exact_ties_go_to_the_lowest_position(exact, batch, k):
    """Few different whole numbers: most image-level activations are equal, within batches and across them."""
    rng = np.random.default_rng(k)
    rows = rng.integers(-1, 2, (33, 60)) * (rng.random((33, 1)) < 0.8)
    ds, sae = ArrayDataset(integers(rows), rng.integers(0, 3, 33), class_names=tuple("abc")), whole_sae()
    images = latents_of(exact, sae, ds)
    expected = naive(images, ds.labels.tolist(), [ds[i].id for i in range(33)], 3, 0.2, k)
    levels = [{round(h[:, j].mean(), 9) for h in images} for j in range(8)]
    assert max(map(len, levels)) < 15, "there must be many ties"
    compare(collect_latents(exact, sae, ds, LAYER, n_reference=k, batch_images=batch), expected)


def test_copies_of_one_image(exact):
    """All equal: the references are the first ten, and a label's entropy is that of their labels."""
    ds = ArrayDataset(integers([[1] * 60] * 25), [0] * 5 + [1] * 20, ids=[f"image {i}" for i in range(25)])
    for batch in (1, 4, 64):
        found = collect_latents(exact, whole_sae(), ds, LAYER, batch_images=batch)
        assert list(found.reference_ids[0]) == [f"image {i}" for i in range(10)]
        assert found.label_entropy[0].item() == pytest.approx(math.log(2), abs=1e-6)
        assert found.label_std[0].item() == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("batch", [1, 3, 4, 7, 23])
def test_copies_of_one_image_in_a_real_model(clip, batch):
    """Copies round differently at different places of a batch; of equal ones the lowest comes first."""
    image = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5))
    ds = ArrayDataset(image.expand(25, 3, SIDE, SIDE), [0] * 25, ids=[f"image {i}" for i in range(25)])
    found = collect_latents(clip, quiet_sae(), ds, LAYER, batch_images=batch)
    for values, rows in zip(found.reference_values.tolist(), found.reference_rows.tolist()):
        assert values == pytest.approx([values[0]] * 10, rel=1e-5, abs=1e-7)
        in_order = sorted(zip(values, rows), key=lambda pair: (-pair[0], pair[1]))
        assert in_order == list(zip(values, rows))


def test_counts_are_of_tokens_strictly_above_tau_with_the_class_token(exact):
    rows = np.zeros((3, 3, 5, 4))
    rows[0, 0, :, 0] = [2, 3, 2, 1, 0]  # coordinate 0 of the five tokens; the first is the class token
    rows[1, 0, :, 0] = [3, 0, 0, 0, 0]
    rows[2, 0, :, 0] = [9, 9, 9, 9, -9]
    ds = ArrayDataset(integers(rows.reshape(3, 60)), [0, 0, 2])
    for tau, first, last in (
        (0.0, 5, 4),
        (0.5, 5, 4),
        (1.0, 4, 4),
        (2.0, 2, 4),
        (2.5, 2, 4),
        (3.0, 0, 4),
        (9.0, 0, 0),
    ):
        found = collect_latents(exact, whole_sae(), ds, LAYER, tau=tau)
        assert found.class_counts[:, 0].tolist() == [first, 0, last], tau
    assert found.frequency[0].item() == 1.0 and found.frequency[1].item() == pytest.approx(
        1 / 3
    )  # not affected by tau


def test_frequency_is_a_share_of_images_not_of_tokens(exact):
    rows = np.zeros((4, 3, 5, 4))
    rows[1, 0, 3, 0] = 1  # one token of one image
    rows[2, 0, :, 0] = 1  # every token of another
    found = collect_latents(exact, whole_sae(), ArrayDataset(integers(rows.reshape(4, 60)), [0] * 4), LAYER)
    assert found.frequency[0].item() == 0.5
    assert found.mean_activation[0].item() == pytest.approx((0.2 + 1.0) / 2)
    assert found.reference_values[0, :3].tolist() == pytest.approx([1.0, 0.2, 0.0])
    assert found.reference_rows[0, :3].tolist() == [2, 1, -1]


def test_entropy_is_in_nats_and_weighted(exact):
    rows = np.zeros((10, 3, 5, 4))
    rows[:, 0, :, 0] = np.array([6, 1, 1, 1, 1, 1, 1, 1, 1, 6])[:, None]
    ds = ArrayDataset(integers(rows.reshape(10, 60)), [0] + [1] * 8 + [2])
    p = [0.3, 0.4, 0.3]
    found = collect_latents(exact, whole_sae(), ds, LAYER)
    assert found.label_entropy[0].item() == pytest.approx(-sum(x * math.log(x) for x in p), abs=1e-6)
    few = collect_latents(
        exact, whole_sae(), ArrayDataset(integers(rows.reshape(10, 60)[:9]), [0] + [1] * 8), LAYER
    )
    assert math.isnan(few.label_entropy[0]) and math.isnan(few.label_std[0]) and few.reference_rows[0, 8] == 8
    one = collect_latents(exact, whole_sae(), ArrayDataset(integers(rows.reshape(10, 60)), [4] * 10), LAYER)
    assert abs(one.label_entropy[0].item()) < 1e-6 and one.label_std[0].item() == 0


def test_class_counts_have_a_row_for_every_class_name(clip):
    ds = ArrayDataset(some_data(12, 2).pixels, [1] * 12, class_names=["none", "all", "none either"])
    found = collect_latents(clip, quiet_sae(), ds, LAYER)
    assert (
        found.class_counts.shape == (3, 20)
        and not found.class_counts[[0, 2]].any()
        and found.class_counts[1].any()
    )


def test_class_token_alone(clip):
    ds, sae = some_data(30, 3), quiet_sae()
    images = [h[:1] for h in latents_of(clip, sae, ds)]
    expected = naive(images, ds.labels.tolist(), [ds[i].id for i in range(30)], 3, 0.2, 10)
    compare(collect_latents(clip, sae, ds, LAYER, tokens="cls"), expected)


def test_tokens_of_an_adapted_tower_beyond_the_image_do_not_count(clip):
    ds, sae = some_data(20, 3), quiet_sae()
    plain, prompted = (
        collect_latents(clip, sae, ds, LAYER),
        collect_latents(Prompted(clip.model), sae, ds, LAYER),
    )
    for name in FIELDS:
        torch.testing.assert_close(getattr(plain, name), getattr(prompted, name), equal_nan=True)


def test_images_of_bytes(clip, image_data):
    sae = quiet_sae()
    pixels = ArrayDataset(
        clip.pixels([image_data[i].image for i in range(14)]),
        image_data.labels,
        ids=[image_data[i].id for i in range(14)],
        class_names=image_data.class_names,
    )
    compare(
        collect_latents(clip, sae, image_data, LAYER),
        naive(
            latents_of(clip, sae, pixels),
            image_data.labels.tolist(),
            [pixels[i].id for i in range(14)],
            3,
            0.2,
            10,
        ),
    )


def test_many_classes_and_one_image_each(clip):
    ds = ArrayDataset(some_data(30, 2).pixels, np.arange(30)[::-1].copy())
    sae = quiet_sae()
    expected = naive(
        latents_of(clip, sae, ds), ds.labels.tolist(), [ds[i].id for i in range(30)], 30, 0.2, 10
    )
    compare(collect_latents(clip, sae, ds, LAYER), expected)
    assert np.nanmax(expected["label_entropy"]) <= math.log(10) + 1e-9


def test_nothing_is_left_on_the_weights(clip):
    sae = quiet_sae()
    before = sae.fingerprint()
    found = collect_latents(clip, sae, some_data(8, 2), LAYER)
    assert sae.fingerprint() == before and all(p.grad is None for p in sae.parameters())
    assert not any(getattr(found, name).requires_grad for name in FIELDS) and torch.is_grad_enabled()


@pytest.mark.parametrize(
    "call",
    [
        lambda clip: collect_latents(clip, random_sae(WIDTH + 1, 4), some_data(3, 2), LAYER),
        lambda clip: collect_latents(
            clip, quiet_sae(), ArrayDataset(torch.zeros(0, 3, SIDE, SIDE), []), LAYER
        ),
        lambda clip: collect_latents(clip, quiet_sae(), some_data(3, 2), 4),
        lambda clip: collect_latents(clip, quiet_sae(), ArrayDataset(torch.zeros(2, 3, 8, 8), [0, 1]), LAYER),
        lambda clip: collect_latents(
            clip, quiet_sae(), ArrayDataset(torch.full((2, 3, SIDE, SIDE), math.nan), [0, 1]), LAYER
        ),
    ],
    ids=["other width", "no images", "no such layer", "other size", "not a number"],
)
def test_what_cannot_be_counted_is_one_sentence(clip, call):
    with pytest.raises(ValueError) as error:
        call(clip)
    assert one_sentence(error.value)


# Tables and files ---------------------------------------------------------------------------------------


def same(one, other):
    return (
        all(torch.equal(getattr(one, n).nan_to_num(-7), getattr(other, n).nan_to_num(-7)) for n in FIELDS)
        and all(
            np.array_equal(np.asarray(getattr(one, n)), np.asarray(getattr(other, n)))
            for n in ("reference_ids", "reference_rows", "reference_labels")
        )
        and (one.n_images, one.tau, one.sae_hash) == (other.n_images, other.tau, other.sae_hash)
    )


def test_table(clip):
    found = collect_latents(clip, quiet_sae(), some_data(20, 3), LAYER)
    table = found.table()
    assert list(table["latent"]) == list(range(20))
    for name in ("frequency", "mean_activation", "label_entropy", "label_std"):
        np.testing.assert_array_equal(table[name].to_numpy(), getattr(found, name).numpy())


def test_save_and_load(clip, tmp_path):
    found = collect_latents(clip, quiet_sae(), some_data(20, 3), LAYER)
    found.save(tmp_path / "a")
    assert same(found, LatentStatistics.load(tmp_path / "a"))
    assert {p.suffix for p in (tmp_path / "a").iterdir()} == {".safetensors", ".json"}


@pytest.mark.parametrize(
    "name, damage",
    [
        ("latents.json", None),
        ("latents.json", lambda b: b"{}"),
        ("latents.json", lambda b: b[:40]),
        ("latents.safetensors", None),
        ("latents.safetensors", lambda b: b[:-3]),
    ],
)
def test_damaged_statistics_are_one_sentence(clip, tmp_path, name, damage):
    collect_latents(clip, quiet_sae(), some_data(20, 3), LAYER).save(tmp_path)
    path = tmp_path / name
    path.unlink() if damage is None else path.write_bytes(damage(path.read_bytes()))
    with pytest.raises((ValueError, OSError)) as error:
        LatentStatistics.load(tmp_path)
    assert one_sentence(error.value)


class Counting(ArrayDataset):
    """A data set that counts the images it is asked for."""

    asked = 0

    def __getitem__(self, i):
        self.asked += 1
        return super().__getitem__(i)


def test_saved_statistics_are_computed_once_for_the_same_question(clip, tmp_path):
    plain, sae = some_data(20, 3), quiet_sae()
    ds = Counting(plain.pixels, plain.labels, class_names=plain.class_names)
    question = Question(clip, sae, LAYER)
    first, = saved_latents(tmp_path, [question], ds)
    assert same(first, collect_latents(clip, sae, plain, LAYER)) and ds.asked >= 20
    before = ds.asked
    assert same(first, *saved_latents(tmp_path, [question], ds, batch_images=7))
    assert same(first, *saved_latents(tmp_path, [Question(clip, sae, LAYER % 4)], ds)) and ds.asked == before
    others = [Question(clip, quiet_sae(1), 0), question, Question(clip, sae, LAYER, "cls"), Question(clip, sae, 0)]
    found = saved_latents(tmp_path, others, ds)
    assert ds.asked == before + 20 and same(first, found[1])
    assert all(same(a, b) for a, b in zip(found, collect_many(others, plain)))


def saved(folder, clip, sae, ds, layer, tokens="all", **settings):
    return saved_latents(folder, [Question(clip, sae, layer, tokens)], ds, **settings)[0]


@pytest.mark.parametrize(
    "change",
    ["tau", "n_reference", "layer", "sae", "clip", "pixels", "labels", "order", "tokens", "class names"],
)
def test_saved_statistics_never_answer_another_question(clip, tmp_path, change):
    question = {"clip": clip, "sae": quiet_sae(), "ds": some_data(20, 3), "layer": LAYER}
    saved(tmp_path, **question)
    ds = question["ds"]
    labels = ds.labels.copy()
    labels[3] = (labels[3] + 1) % 3
    pixels = ds.pixels.clone()
    pixels[19] += 0.5
    other = (
        question
        | {
            "tau": {"tau": 0.5},
            "n_reference": {"n_reference": 4},
            "layer": {"layer": 0},
            "sae": {"sae": quiet_sae(1)},
            "clip": {"clip": Clip(random_clip_model(9), clip.tokenizer, clip.processor)},
            "tokens": {"tokens": "cls"},
            "pixels": {"ds": ArrayDataset(pixels, ds.labels, class_names=ds.class_names)},
            "labels": {"ds": ArrayDataset(ds.pixels, labels, class_names=ds.class_names)},
            "order": {
                "ds": ArrayDataset(ds.pixels.flip(0), ds.labels[::-1].copy(), class_names=ds.class_names)
            },
            "class names": {
                "ds": ArrayDataset(ds.pixels, ds.labels, class_names=[*ds.class_names, "one more"])
            },
        }[change]
    )
    fresh = collect_latents(**other)
    try:
        found = saved(tmp_path, **other)
    except ValueError as error:
        assert one_sentence(error)
    else:
        assert same(found, fresh)


# Several at once ----------------------------------------------------------------------------------------


def test_many_questions_in_one_pass_have_the_answers_that_each_has_alone(clip, monkeypatch):
    """Two towers, three layers, other widths and activations, the class token and prompts; each image read once."""
    plain, prompted = some_data(20, 3), new_maple(clip, ("cat", "dog", "pig"), 2, 2, True, 0)
    ds = Counting(plain.pixels, plain.labels, class_names=plain.class_names)
    topk = SparseAutoencoder(WIDTH, 30, torch.Generator().manual_seed(2), "topk", 3)
    questions = [Question(clip, quiet_sae(), LAYER), Question(prompted, quiet_sae(), LAYER, "all and prompts"),
                 Question(clip, topk, 3), Question(clip, quiet_sae(), 0, "cls"), Question(prompted, topk, 0),
                 Question(clip, quiet_sae(4), -1)]
    calls, through = [], clip._through
    monkeypatch.setattr(clip, "_through", lambda z, first, end: calls.append(end - first) or through(z, first, end))
    found = collect_many(questions, ds, 0.1, 4, 7)
    assert ds.asked == 20 and sum(calls) == 3 * len(clip.blocks)
    for question, statistics in zip(questions, found):
        q = question
        assert same(statistics, collect_latents(q.clip, q.sae, plain, q.layer, 0.1, 4, 7, q.tokens))


def test_questions_that_cannot_be_answered_together(clip):
    other = Clip(random_clip_model(), None, None)
    for questions in ([], [Question(clip, quiet_sae(), LAYER), Question(other, quiet_sae(), LAYER)]):
        with refused("in one pass"):
            collect_many(questions, some_data(3, 2))
    with refused("width"):
        Question(clip, random_sae(WIDTH + 1, 4), LAYER)


# Many processes -----------------------------------------------------------------------------------------


SHARED = """
import sys
from pathlib import Path
from conftest import LAYER, random_clip_model
from test_latents import quiet_sae, some_data, whole_sae, integers, Exact
import numpy as np, torch
from patchsae import ArrayDataset
from patchsae.fast import processes
from patchsae.clip import Clip
from patchsae.data import reading
from patchsae.data.images import FileDataset
from patchsae.latents import Question, collect_latents, saved_latents
import conftest

torch.set_num_threads(1)
processes.join()
reading.MOST_UNREADABLE = 0.2
out, clip = Path(sys.argv[1]), Clip(random_clip_model(), None, conftest.tiny_processor())
rng = np.random.default_rng(0)
ties = ArrayDataset(integers(rng.integers(-1, 2, (33, 60))), rng.integers(0, 3, 33), class_names=tuple("abc"))
asked = {"plain": (clip, quiet_sae(), some_data(40, 4), 10, 6),
         "last part small": (clip, quiet_sae(), some_data(13, 3), 3, 6),
         "ties": (Exact(random_clip_model()), whole_sae(), ties, 7, 4),
         "one batch": (clip, quiet_sae(), some_data(5, 3), 3, 8)}
for name, (model, sae, ds, k, batch) in asked.items():
    for rank in range(2):
        found = collect_latents(model, sae, ds, LAYER, n_reference=k, batch_images=batch)
        if processes.rank() == rank:
            found.save(out / f"{name} {rank}")
images = Path(sys.argv[2])
files = FileDataset(images, [(images / f"{i:04}.png", i % 2) for i in range(40)], ("even", "odd"), conftest.SIDE)
found, = saved_latents(out / "kept", [Question(clip, quiet_sae(), LAYER)], files, n_reference=3, batch_images=5)
assert sorted(files.unreadable) == [3, 8, 30] and found.n_unreadable == 3 and found.n_images == 37
found.save(out / f"files {processes.rank()}")
"""


def test_two_processes_find_what_one_does(tmp_path):
    """Each of two processes, bit for bit; images that cannot be read are counted over both."""
    (tmp_path / "images").mkdir()
    folder(tmp_path / "images", 40, (3, 8, 30))
    for n in (1, 2):
        (tmp_path / str(n)).mkdir()
        for error, status in launch(SHARED, str(tmp_path / str(n)), str(tmp_path / "images"), n=n):
            assert status == 0, error
    for name in ("plain", "last part small", "ties", "one batch", "files"):
        expected = LatentStatistics.load(tmp_path / "1" / f"{name} 0")
        for rank in range(2):
            assert same(LatentStatistics.load(tmp_path / "2" / f"{name} {rank}"), expected), (name, rank)
    assert len(list((tmp_path / "2" / "kept").iterdir())) == 1


# Autoencoders that are encoded in parts -----------------------------------------------------------------


def test_parts_are_the_whole(exact, monkeypatch):
    """Integers, so that no order of a sum shows: the same bits in parts of a few images and latents as at once."""
    rng = np.random.default_rng(3)
    ds = ArrayDataset(integers(rng.integers(-2, 3, (23, 60))), rng.integers(0, 3, 23), class_names=tuple("abc"))
    sae = whole_sae(20)
    whole = collect_latents(exact, sae, ds, LAYER, n_reference=4, batch_images=7)
    monkeypatch.setattr(onednn, "WIDE", WIDTH)
    monkeypatch.setattr(encoder, "LATENTS_AT_ONCE", 6)
    monkeypatch.setattr(encoder, "IMAGES_AT_ONCE", 3)
    assert encoder.Encoder(sae).rows is not None
    assert same(whole, collect_latents(exact, sae, ds, LAYER, n_reference=4, batch_images=7))


def test_parts_against_the_loop(clip, monkeypatch):
    monkeypatch.setattr(onednn, "WIDE", WIDTH)
    monkeypatch.setattr(encoder, "LATENTS_AT_ONCE", 8)
    ds, sae = some_data(40, 4), quiet_sae()
    expected = naive(latents_of(clip, sae, ds), ds.labels.tolist(), [ds[i].id for i in range(40)], 4, 0.2, 10)
    compare(collect_latents(clip, sae, ds, LAYER), expected)


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu"])
def test_other_activations_are_never_encoded_in_parts(activation, monkeypatch):
    monkeypatch.setattr(onednn, "WIDE", 4)
    monkeypatch.setattr(encoder, "LATENTS_AT_ONCE", 6)
    assert encoder.Encoder(SparseAutoencoder(WIDTH, 20, activation=activation, k=3)).rows is None


def test_oneDNN_is_not_asked_for_gradients(monkeypatch):
    monkeypatch.setattr(onednn, "WIDE", 4)
    layer, x = torch.nn.Linear(6, 5), torch.randn(3, 6, requires_grad=True)
    with onednn.Linears():
        y = layer(x)
        y.sum().backward()
        with torch.no_grad():
            torch.testing.assert_close(layer(x), y)
    assert x.grad is not None and layer.weight.grad is not None
