"""The cut against transformers' own forward pass; text, prototypes, loss and preprocessing against theirs."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import SIDE, WIDTH, one_sentence, random_clip_model, tiny_processor
from PIL import Image
from safetensors.torch import load_file, save_file

from patchsae import load_clip
from patchsae.clip import Clip, class_prototypes, contrastive_loss
from patchsae.world.pretrain import build_processor, build_tokenizer


def images(n, seed=0, side=SIDE):
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def theirs(model, pixels):
    with torch.no_grad():
        found = model.get_image_features(pixel_values=pixels)
    return found if isinstance(found, torch.Tensor) else found.pooler_output


# The cut ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("blocks", [1, 3, 4])
@pytest.mark.parametrize("batch", [1, 5])
def test_above_of_below_is_the_model(attention, blocks, batch):
    model = random_clip_model(seed=blocks, blocks=blocks, attention=attention)
    clip, pixels = Clip(model), images(batch)
    expected = theirs(model, pixels)
    for layer in range(-blocks, blocks):
        found = clip.above(clip.below(pixels, layer), layer)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert expected.std(0 if batch > 1 else 1).min() > 1e-3, "the random model must tell images apart"


@pytest.mark.parametrize("layer", range(-4, 4))
def test_below_is_the_hidden_state_after_the_block(clip, layer):
    pixels = images(3)
    with torch.no_grad():
        states = clip.model.vision_model(pixels, output_hidden_states=True).hidden_states
    z = clip.below(pixels, layer)
    assert z.shape == (3, 5, WIDTH) and len(states) == 5
    torch.testing.assert_close(z, states[1 + layer % 4], rtol=1e-5, atol=1e-5)
    assert torch.equal(z, clip.below(pixels, layer % 4 - 4 if layer >= 0 else layer + 4))


def test_above_reads_edited_tokens(clip):
    """Changing any one token changes the embedding, as long as a block is left to mix it in."""
    z = clip.below(images(1), -2)
    plain = clip.above(z, -2)
    for token in range(5):
        changed = z.clone()
        changed[0, token] += torch.linspace(-1, 1, WIDTH)
        assert (clip.above(changed, -2) - plain).abs().max() > 1e-4, token
    last = clip.below(images(1), -1)
    changed = last.clone()
    changed[0, 1:] += 3
    assert torch.equal(clip.above(changed, -1), clip.above(last, -1))


def test_above_takes_more_tokens_and_gives_gradients(clip):
    z = torch.cat([clip.below(images(2), -2), torch.zeros(2, 3, WIDTH)], 1).requires_grad_()
    with torch.no_grad():
        for block in clip.model.vision_model.encoder.layers[3:]:
            expected = block(z, None)
        expected = clip.model.visual_projection(clip.model.vision_model.post_layernorm(expected[:, 0]))
    found = clip.above(z, -2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    found.square().sum().backward()
    assert z.grad[:, 5:].abs().max() > 0 and all(p.grad is None for p in clip.model.parameters())


def test_images_of_a_batch_do_not_touch_each_other(clip):
    pixels = images(6)
    alone = torch.cat([clip.below(pixels[i : i + 1], -2) for i in range(6)])
    torch.testing.assert_close(clip.below(pixels, -2), alone, rtol=1e-4, atol=1e-5)
    mixed = pixels.clone()
    mixed[2] = math.nan
    z = clip.below(mixed, -2)
    keep = [0, 1, 3, 4, 5]
    assert bool(torch.isfinite(z[keep]).all()) and bool(torch.isnan(z[2]).any())


@pytest.mark.parametrize(
    "call",
    [
        lambda c: c.below(images(1, side=SIDE + 8), -2),
        lambda c: c.below(images(1)[0], -2),
        lambda c: c.below(images(1)[:, :1], -2),
        lambda c: c.below(images(1), 4),
        lambda c: c.below(images(1), -5),
        lambda c: c.above(torch.zeros(1, 5, WIDTH), 4),
        lambda c: c.above(torch.zeros(1, 5, WIDTH + 1), -2),
        lambda c: c.above(torch.zeros(5, WIDTH), -2),
        lambda c: Clip(c.model).text_features(["a"]),
        lambda c: Clip(c.model).pixels([np.zeros((4, 4, 3), np.uint8)]),
    ],
)
def test_what_does_not_fit_is_one_sentence(clip, call):
    with pytest.raises(ValueError) as error:
        call(clip)
    assert one_sentence(error.value)


def test_weights_are_frozen_and_in_evaluation_mode(clip):
    assert not clip.model.training and not any(p.requires_grad for p in clip.model.parameters())
    assert (clip.image_size, clip.grid, clip.n_tokens, clip.width) == (SIDE, 2, 5, WIDTH)
    assert clip.logit_scale.item() == pytest.approx(math.exp(2.5))


# Text ---------------------------------------------------------------------------------------------------

PROMPTS = [
    "a photo of a cat.",
    "a red striped dog on grass.",
    "cat",
    "a sketch of a ship with the word taxi.",
    "",
    "zebra?",
]


def test_text_features_equal_transformers(clip):
    tokens = clip.tokenizer(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = clip.model.get_text_features(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        )
    expected = expected if isinstance(expected, torch.Tensor) else expected.pooler_output
    expected = expected / expected.square().sum(1, keepdim=True).sqrt()
    found = clip.text_features(PROMPTS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(len(PROMPTS)))
    assert not found.requires_grad


@pytest.mark.parametrize("batch", [1, 2, 4, 256])
def test_a_prompt_does_not_depend_on_its_neighbours(clip, batch):
    torch.testing.assert_close(
        clip.text_features(PROMPTS, batch=batch),
        torch.cat([clip.text_features([p]) for p in PROMPTS]),
        rtol=1e-4,
        atol=1e-5,
    )


def test_a_prompt_too_long_is_cut(clip):
    assert clip.text_features(["a cat " * 40]).shape == (1, 8)


def test_logits_are_cosines_times_temperature(clip):
    embeddings, text = torch.randn(3, 8) * 4, clip.text_features(PROMPTS)
    found = clip.logits(embeddings, text)
    for i, j in np.ndindex(3, len(PROMPTS)):
        cosine = float(embeddings[i] @ text[j]) / float(embeddings[i].norm())
        assert found[i, j].item() == pytest.approx(math.exp(2.5) * cosine, rel=1e-4, abs=1e-5)
    prompts = clip.tokenizer(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        whole = clip.model(pixel_values=images(3), **{k: prompts[k] for k in ("input_ids", "attention_mask")})
    found = clip.logits(clip.above(clip.below(images(3), -2), -2), text)
    torch.testing.assert_close(found, whole.logits_per_image, rtol=1e-4, atol=1e-4)


def test_class_prototypes(clip):
    names, templates = ["cat", "dog", "sail boat"], ["a photo of a {}.", "a sketch of a {}.", "{}"]
    mean = torch.stack(
        [torch.stack([clip.text_features([t.format(n)])[0] for t in templates]).mean(0) for n in names]
    )
    torch.testing.assert_close(
        class_prototypes(clip, names, templates, renormalise=False), mean, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        class_prototypes(clip, names, templates), mean / mean.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-5
    )
    assert bool((mean.norm(dim=1) < 0.999).all())


def loop_contrastive(scores, groups):
    """Cross-entropy of every row and of every column, all pairs of the same group as equal positives."""
    n, total = len(scores), 0.0
    for way in (scores, scores.T):
        for i in range(n):
            positives = [j for j in range(n) if groups[j] == groups[i]]
            partition = math.log(sum(math.exp(v) for v in way[i].tolist()))
            total += sum(partition - way[i, j].item() for j in positives) / len(positives) / n
    return total / 2


@pytest.mark.parametrize("groups", [[0, 1, 2, 3, 4], [0, 1, 0, 2, 0], [7, 7, 7, 7, 7], [3, 3, 1, 1, 0]])
def test_contrastive_loss_equals_the_loop(groups):
    numbers = torch.Generator().manual_seed(0)
    a, b = (torch.nn.functional.normalize(torch.randn(5, 6, generator=numbers), dim=1) for _ in range(2))
    found = contrastive_loss(a, b, torch.tensor(groups), 9.0)
    assert found.item() == pytest.approx(loop_contrastive((9.0 * a @ b.T).double(), groups), rel=1e-5)
    assert contrastive_loss(b, a, torch.tensor(groups), 9.0).item() == pytest.approx(found.item(), rel=1e-5)


def test_contrastive_loss_equals_transformers_without_duplicates(clip):
    tokens = clip.tokenizer(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        whole = clip.model(
            pixel_values=images(6),
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            return_loss=True,
        )
    found = contrastive_loss(whole.image_embeds, whole.text_embeds, torch.arange(6), clip.logit_scale)
    assert found.item() == pytest.approx(whole.loss.item(), rel=1e-4)


# Pixels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(SIDE, SIDE), (40, 23), (17, 90), (8, 8), (1, 30)])
def test_pixels_equal_transformers_preprocessing(clip, shape):
    arrays = [np.random.default_rng(i).integers(0, 256, (*shape, 3), dtype=np.uint8) for i in range(3)]
    expected = tiny_processor()(images=[Image.fromarray(a) for a in arrays], return_tensors="pt")[
        "pixel_values"
    ]
    found = clip.pixels(arrays)
    assert found.shape == (3, 3, SIDE, SIDE) and found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert torch.equal(clip.pixels([Image.fromarray(a) for a in arrays]), expected)
    assert torch.equal(clip.pixels(np.stack(arrays)), expected)
    assert torch.equal(clip.pixels([torch.from_numpy(a) for a in arrays]), expected)


def test_pixels_of_different_sizes_in_one_batch(clip):
    arrays = [
        np.random.default_rng(i).integers(0, 256, (20 + 7 * i, 31, 3), dtype=np.uint8) for i in range(4)
    ]
    assert torch.equal(clip.pixels(arrays), torch.cat([clip.pixels([a]) for a in arrays]))


@pytest.mark.parametrize("as_image", [False, True])
def test_pixels_of_a_single_image(clip, as_image):
    array = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    assert torch.equal(clip.pixels(Image.fromarray(array) if as_image else array), clip.pixels([array]))


def test_pixels_by_hand():
    """At the model's own size there is no resampling: only 1/255, the mean and the standard deviation."""
    array = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    found = Clip(random_clip_model(), processor=tiny_processor()).pixels([array])[0]
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    for c in range(3):
        expected = (array[:, :, c] / 255 - mean[c]) / std[c]
        np.testing.assert_allclose(found[c].numpy(), expected, rtol=1e-5, atol=1e-5)


# Loading ------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    random_clip_model(seed=4, vocabulary=len(build_tokenizer())).save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def test_load_a_folder_without_tokenizer(folder):
    clip = load_clip(folder)
    expected = random_clip_model(seed=4, vocabulary=len(build_tokenizer()))
    torch.testing.assert_close(
        clip.above(clip.below(images(2), 1), 1), theirs(expected.eval(), images(2)), rtol=1e-4, atol=1e-5
    )
    assert clip.fingerprint() == Clip(expected).fingerprint() != Clip(random_clip_model(seed=5)).fingerprint()
    for call in (lambda: clip.text_features(["a cat"]), lambda: clip.pixels([np.zeros((4, 4, 3), np.uint8)])):
        with pytest.raises(ValueError) as error:
            call()
        assert one_sentence(error.value)


def test_load_a_whole_folder(folder):
    build_tokenizer().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    clip = load_clip(str(folder))
    array = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    direct = Clip(clip.model, build_tokenizer(), tiny_processor())
    assert torch.equal(clip.pixels([array]), direct.pixels([array]))
    torch.testing.assert_close(clip.text_features(PROMPTS), direct.text_features(PROMPTS))


def test_the_mini_processor_gives_the_same_pixels_as_pretraining_used():
    from patchsae.world.pretrain import normalise

    arrays = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    clip = load_clip("data/mini/clip")
    torch.testing.assert_close(
        normalise(arrays, build_processor()), clip.pixels(arrays), rtol=1e-5, atol=1e-5
    )


def test_half_precision_weights_are_read_as_float32(folder):
    weights = {name: value.half() for name, value in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert {p.dtype for p in load_clip(folder).model.parameters()} == {torch.float32}


def damage(folder, how):
    weights = folder / "model.safetensors"
    if how == "no such folder":
        shutil.rmtree(folder)
    elif how == "empty folder":
        for path in folder.iterdir():
            path.unlink()
    elif how == "no weights":
        weights.unlink()
    elif how == "cut short":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "config is not json":
        (folder / "config.json").write_text("{")
    elif how == "a weight is missing":
        kept = load_file(weights)
        del kept["vision_model.encoder.layers.1.mlp.fc1.weight"]
        save_file(kept, weights, {"format": "pt"})
    elif how == "a weight too many":
        save_file(load_file(weights) | {"vision_model.more.weight": torch.ones(2)}, weights, {"format": "pt"})
    elif how == "beyond float32":
        kept = load_file(weights)
        kept["visual_projection.weight"] = kept["visual_projection.weight"].double() * 1e300
        save_file(kept, weights, {"format": "pt"})
    elif how == "whole numbers":
        kept = load_file(weights)
        kept["visual_projection.weight"] = kept["visual_projection.weight"].int()
        save_file(kept, weights, {"format": "pt"})
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "config of something else":
        (folder / "config.json").write_text('{"model_type": "siglip", "vision_config": {}}')
    elif how == "config without end":
        (folder / "config.json").write_text("[" * 10**5)
    elif how.startswith("config: "):
        section, key, value = how[8:].split()
        config = json.loads((folder / "config.json").read_text())
        config[section] = config[section] | {key: json.loads(value)} if key != "all" else json.loads(value)
        (folder / "config.json").write_text(json.dumps(config))
    elif how == "damaged tokenizer":
        build_tokenizer().save_pretrained(folder)
        (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text()[:-30])
    elif how == "damaged tokenizer settings":
        build_tokenizer().save_pretrained(folder)
        (folder / "tokenizer_config.json").write_text("{")
    elif how == "no tokenizer.json":
        build_tokenizer().save_pretrained(folder)
        (folder / "tokenizer.json").unlink()
    elif how.startswith("processor"):
        tiny_processor().save_pretrained(folder)
        file = folder / "preprocessor_config.json"
        _, *change = how.split(" ", 2)
        text = json.dumps(json.loads(file.read_text()) | {change[0]: json.loads(change[1])}) if change else "{"
        file.write_text(text)
    elif how == "other shapes":
        config = json.loads((folder / "config.json").read_text())
        config["vision_config"]["intermediate_size"] = 36
        (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "how",
    [
        "no such folder",
        "empty folder",
        "no weights",
        "cut short",
        "config is not json",
        "a weight is missing",
        "a weight too many",
        "beyond float32",
        "whole numbers",
        "no config",
        "config of something else",
        "config without end",
        "config: vision_config num_hidden_layers 3",
        "config: text_config num_hidden_layers 3",
        "config: vision_config num_attention_heads 5",
        "config: vision_config hidden_size -1",
        "config: vision_config patch_size 0",
        'config: vision_config hidden_size "twelve"',
        "config: vision_config all 3",
        "damaged tokenizer",
        "damaged tokenizer settings",
        "no tokenizer.json",
        "processor",
        "processor image_std [0.3,0,0.3]",
        "processor image_std [0.3,-0.2,0.3]",
        "processor image_std [0.3,1e-300,0.3]",
        "processor image_mean [0.3,NaN,0.3]",
        "processor image_mean [0.3,Infinity,0.3]",
        'processor image_mean "grey"',
        "processor image_std [0.3]",
        "processor rescale_factor 0",
        "processor rescale_factor NaN",
    ],
)
def test_a_damaged_folder_is_one_sentence(folder, how):
    damage(folder, how)
    with pytest.raises((ValueError, OSError)) as error:
        load_clip(folder)
    assert one_sentence(error.value)


def test_a_model_in_memory_is_used_itself():
    model = random_clip_model(seed=4)
    clip = load_clip(model)
    assert clip.model is model and clip.tokenizer is None and clip.processor is None
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in load_clip(random_clip_model().half()).model.parameters()} == {torch.float32}
    double = random_clip_model().double()
    double.visual_projection.weight.data *= 1e300
    with pytest.raises(ValueError, match="visual_projection") as error:
        load_clip(double)
    assert one_sentence(error.value)


def test_paths_are_as_given_or_else_in_the_project(folder, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("patchsae.config.ROOT", tmp_path)
    expected = load_clip(folder).fingerprint()
    assert load_clip("clip").fingerprint() == expected  # the project's
    random_clip_model(seed=5).save_pretrained(tmp_path / "here" / "clip")
    assert load_clip("clip").fingerprint() == load_clip("../here/clip").fingerprint() != expected
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "here")) as error:
        load_clip("some/where/else")
    assert one_sentence(error.value)
