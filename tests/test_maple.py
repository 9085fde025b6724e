"""Prompts in both towers: against the slow twin, official checkpoints, gradients, and what must not change."""

import re

import pytest
import torch
from conftest import one_sentence, random_clip_model
from maple_twin import image_states, state_dict, text_embeddings
from transformers import BatchEncoding

from patchsae.clip import Clip
from patchsae.maple import MaPLe, Prompts, class_tokens, new_maple

CLASSES = ("cat", "dog", "big truck")
PROMPTS = [f"a photo of a {name}." for name in CLASSES]


def token_ids(classes=5, words=100, seed=3):
    """Prompts as OpenAI tokenises them: start, four words, one to three of the class, a stop, end, padding 0."""
    numbers = torch.Generator().manual_seed(seed)
    ids = torch.zeros(classes, 77, dtype=torch.long)
    for c in range(classes):
        name = torch.randint(10, words - 2, (1 + c % 3,), generator=numbers)
        prompt = torch.cat([torch.tensor([words - 2, 1, 2, 3, 1]), name, torch.tensor([4, words - 1])])
        ids[c, :len(prompt)] = prompt
    return ids


@pytest.mark.parametrize("depth, blocks, text_blocks", [(1, 4, 4), (3, 4, 4), (3, 12, 12), (9, 12, 12)])
def test_an_official_checkpoint_gives_the_embeddings_of_the_slow_twin(depth, blocks, text_blocks):
    state, table = state_dict(depth, blocks=blocks, text_blocks=text_blocks)
    ids, pixels = token_ids(), torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    model = MaPLe.from_official(state, token_embedding=table, token_ids=ids)
    states, embeddings = image_states(state, pixels)
    for layer in range(blocks):
        z = model.below(pixels, layer)
        assert z.shape == (3, 17 + 2, 128)
        assert (z - states[layer]).abs().max() < 2e-4 * states[layer].abs().max()
        assert (model.above(z, layer) - embeddings).abs().max() < 1e-5 * max(1, embeddings.abs().max())
    assert (model.text_features() - text_embeddings(state, table, ids)).abs().max() < 1e-5


def test_a_checkpoint_file_is_read(tmp_path):
    state, table = state_dict(depth=2)
    path = tmp_path / "model.pth.tar-5"
    torch.save({"state_dict": {k: v.half() for k, v in state.items()}, "epoch": 5, "val_result": None}, path)
    ids = token_ids()
    model = MaPLe.from_official(path, token_embedding=torch.nn.Embedding.from_pretrained(table), token_ids=ids)
    rounded = {k: v.half().float() for k, v in state.items()}
    assert (model.text_features() - text_embeddings(rounded, table, ids)).abs().max() < 1e-5
    assert all(p.dtype == torch.float32 for p in model.prompts.parameters())


def _state_with(changes=None, without=()):
    state, table = state_dict(depth=3)
    return {k: v for k, v in (state | (changes or {})).items() if k not in without}, table


@pytest.mark.parametrize("changes, without, named", [
    ({}, ["prompt_learner.ctx"], "prompt_learner.ctx"),
    ({}, ["prompt_learner.compound_prompts_text.0"], "compound_prompts_text.0"),
    ({}, ["prompt_learner.compound_prompt_projections.1.bias"], "compound_prompt_projections.1.bias"),
    ({}, ["prompt_learner.proj.weight"], "proj.weight"),
    ({"prompt_learner.proj.weight": torch.zeros(64, 64)}, [], "proj.weight"),
    ({"prompt_learner.compound_prompts_text.2": torch.zeros(2, 64)}, [], "compound_prompt_projections.2"),
    ({"prompt_learner.ctx": torch.full((2, 64), float("nan"))}, [], "ctx"),
    ({"prompt_learner.ctx": torch.full((2, 64), 1e300, dtype=torch.float64)}, [], "ctx"),
    ({"image_encoder.VPT": torch.zeros(4, 128)}, [], "IVLP"),
    ({"text_encoder.transformer.resblocks.1.VPT_shallow": torch.zeros(4, 64)}, [], "IVLP"),
    ({7: torch.zeros(2)}, [], "7"),
    ({"image_encoder.extra": torch.zeros(2)}, [], "visual.extra"),
    ({"something.else": torch.zeros(2)}, [], "something.else"),
    ({}, ["image_encoder.conv1.weight"], "visual.conv1.weight"),
    ({}, ["text_encoder.transformer.resblocks.2.mlp.c_fc.bias"], "text_model.encoder.layers.2.mlp.fc1.bias"),
    ({"image_encoder.ln_post.weight": torch.zeros(64)}, [], "vision_model.post_layernorm.weight"),
])
def test_a_checkpoint_that_does_not_fit_is_refused_by_the_name_of_the_key(changes, without, named):
    state, table = _state_with(changes, without)
    with pytest.raises(ValueError, match=re.escape(named)) as error:
        MaPLe.from_official(state, token_embedding=table, token_ids=token_ids())
    assert one_sentence(error.value)


@pytest.mark.parametrize("has, asked, named", [(3, 9, "compound_prompts_text.2"), (9, 3, "compound_prompts_text.2")])
def test_another_depth_than_asked_for_is_refused(has, asked, named):
    state, table = state_dict(has, blocks=12, text_blocks=12)
    with pytest.raises(ValueError, match=named) as error:
        MaPLe.from_official(state, token_embedding=table, token_ids=token_ids(), depth=asked)
    assert one_sentence(error.value)


def test_what_a_checkpoint_lacks_has_to_be_given():
    state, table = state_dict(depth=2)
    for given, named in (({"token_ids": token_ids()}, "token_embedding"), ({"token_embedding": table}, "token_ids")):
        with pytest.raises(ValueError, match=named) as error:
            MaPLe.from_official(state, **given)
        assert one_sentence(error.value)


def test_a_checkpoint_goes_onto_the_clip_it_was_trained_on_and_no_other(clip):
    state, table = state_dict(depth=2)
    plain = MaPLe.from_official(state, token_embedding=table, token_ids=token_ids())
    again = MaPLe.from_official({k: v.half() for k, v in state.items()}, token_ids=token_ids(), clip=plain)
    assert again.model is plain.model
    with pytest.raises(ValueError, match="trained on another CLIP") as error:
        MaPLe.from_official(state, token_ids=token_ids(), clip=clip)
    assert one_sentence(error.value)


class Words:
    """A tokenizer of whole words: 98 starts, 99 ends, a stop is a word of its own; 0 pads to 77 tokens."""

    def __init__(self):
        self.known = {}

    def __call__(self, prompts, **_):
        ids = torch.zeros(len(prompts), 77, dtype=torch.long)
        for row, prompt in zip(ids, prompts):
            words = prompt.replace(".", " .").split()
            tokens = [98, *(self.known.setdefault(word, 1 + len(self.known)) for word in words), 99]
            row[:len(tokens)] = torch.tensor(tokens)
        return BatchEncoding({"input_ids": ids})


def trained_with(before, n, classes=CLASSES, half=True):
    """A checkpoint trained with these words in front of every class, its CLIP and the tokens of its prompts."""
    state, table = state_dict(depth=2, n=n)
    ids = Words()([f"{before} {name}." for name in classes])["input_ids"]
    state["prompt_learner.token_suffix"] = table[ids[:, 1 + n:]]
    clip = MaPLe.from_official(state, token_embedding=table, token_ids=ids)
    clip.tokenizer = Words()
    clip.tokenizer([f"{before} {name}." for name in classes])  # the same words have the same numbers
    return ({key: value.half() for key, value in state.items()} if half else state), table, clip, ids


@pytest.mark.parametrize("before, n", [
    ("a photo of a", 1), ("a photo of a", 2), ("a photo of a", 4), ("an image of a", 2), ("X", 1), ("X X", 2),
    ("X X X", 3), ("X X X X", 4), ("X X X X X X", 6), ("a photo", 2)])
@pytest.mark.parametrize("half", [False, True])
def test_classes_are_called_as_in_training(before, n, half, tmp_path):
    """Words that are learned have no other meaning than their number; those behind them stand in the checkpoint."""
    state, table, clip, ids = trained_with(before, n, half=half)
    model = MaPLe.from_official(state, clip=clip, class_names=CLASSES)
    expected = text_embeddings({k: v.float() for k, v in state.items()}, table, ids)
    assert (model.text_features() - expected).abs().max() < (2e-3 if half else 1e-5)
    again = model.for_classes(CLASSES[::-1]).text_features()
    torch.testing.assert_close(again, model.text_features().flip(0), rtol=1e-5, atol=1e-5)
    model.save(tmp_path)
    torch.testing.assert_close(MaPLe.load(tmp_path, clip, CLASSES).text_features(), model.text_features())


@pytest.mark.parametrize("before, n, classes", [
    ("this is a photo of a", 2, CLASSES), ("a photo of the", 2, CLASSES), ("a picture of my", 3, CLASSES),
    ("X X", 2, ("big cat", "big dog")), ("X", 1, ("cat",))])
def test_words_that_cannot_be_told_are_refused(before, n, classes):
    state, _, clip, ids = trained_with(before, n, classes)
    with pytest.raises(ValueError, match="token_ids") as error:
        MaPLe.from_official(state, clip=clip, class_names=CLASSES)
    assert one_sentence(error.value)
    MaPLe.from_official(state, clip=clip, token_ids=ids)


@pytest.mark.parametrize("suffix", [
    None, torch.zeros(3), torch.zeros(3, 74, 5), torch.zeros(3, 1, 64), torch.zeros(0, 74, 64)])
def test_a_checkpoint_that_does_not_tell_its_words_is_refused(suffix):
    state, _, clip, _ = trained_with("a photo of a", 2)
    del state["prompt_learner.token_suffix"]
    if suffix is not None:
        state["prompt_learner.token_suffix"] = suffix
    with pytest.raises(ValueError, match="token_suffix") as error:
        MaPLe.from_official(state, clip=clip, class_names=CLASSES)
    assert one_sentence(error.value)


def test_more_tokens_than_words_leave_the_names_whole(clip):
    """Six learned tokens take the place of six placeholders, not of the template and two words of the name."""
    model = new_maple(clip, ["big truck", "red truck"], n=6, depth=1, vision=False, seed=0)
    assert (model.text_features()[0] - model.text_features()[1]).abs().max() > 1e-3
    assert torch.equal(model.token_ids[0, 7:9], clip.tokenise(["big truck"])["input_ids"][0, 1:3])
    torch.testing.assert_close(model.for_classes(["red truck"]).text_features()[0], model.text_features()[1])


# On any CLIP --------------------------------------------------------------------------------------------

@pytest.fixture
def pixels():
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(8))


def test_without_prompts_it_is_the_plain_clip_bit_for_bit(clip, pixels):
    ids = class_tokens(clip, CLASSES)
    model = MaPLe(clip, None, ids)
    for layer in range(4):
        assert torch.equal(model.below(pixels, layer), clip.below(pixels, layer))
        assert torch.equal(model.above(model.below(pixels, layer), layer), clip.above(clip.below(pixels, layer), layer))
    assert torch.allclose(model.text_features(), clip.text_features(PROMPTS), atol=1e-6)
    assert model.fingerprint() == clip.fingerprint()


def test_text_prompts_that_repeat_the_words_they_replace_change_nothing(clip):
    model = new_maple(clip, CLASSES, n=2, depth=1, vision=False, seed=0)
    assert torch.allclose(model.text_features(), clip.text_features(PROMPTS), atol=1e-6)
    assert model.prompts.image(0) is None


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_the_cut_is_exact_at_every_layer(clip, pixels, depth):
    model = new_maple(clip, CLASSES, n=3, depth=depth, vision=True, seed=1)
    whole = model.above(model.below(pixels, -1), -1)
    for layer in range(4):
        z = model.below(pixels, layer)
        assert z.shape == (3, clip.n_tokens + 3, clip.width)
        assert torch.allclose(model.above(z, layer), whole, atol=1e-5)


def test_prompts_of_a_block_are_fresh_up_to_the_depth_and_carried_on_after_it(clip, pixels):
    model = new_maple(clip, CLASSES, n=2, depth=3, vision=True, seed=1)
    z = model.below(pixels, 0)
    assert torch.equal(model.before_block(z, 1)[:, clip.n_tokens:], model.prompts.image(1).expand(3, -1, -1))
    assert torch.equal(model.before_block(z, 1)[:, :clip.n_tokens], z[:, :clip.n_tokens])
    assert model.before_block(z, 3) is z


def test_start_values_are_the_published_ones(clip):
    model = new_maple(clip, CLASSES, n=2, depth=4, vision=True, seed=1)
    p, table = model.prompts, clip.model.text_model.embeddings.token_embedding.weight
    assert torch.equal(p.ctx, table[model.token_ids[0, 1:3]])
    first, *others = p.compound_prompt_projections
    assert all(torch.equal(first.weight, other.weight) and torch.equal(first.bias, other.bias) for other in others)
    assert not torch.equal(first.weight, p.proj.weight)
    assert first.weight.abs().max() <= p.ctx.shape[1] ** -0.5
    deep = torch.cat(list(p.compound_prompts_text))
    assert 0.012 < deep.std() < 0.028
    same, other = (new_maple(clip, CLASSES, n=2, depth=4, vision=True, seed=s).fingerprint() for s in (1, 2))
    assert model.fingerprint() == same != other


def test_trainable_numbers_at_the_published_size():
    counted = {depth: sum(p.numel() for p in Prompts(2, depth, 512, 768).parameters()) for depth in (3, 9)}
    assert counted == {3: 1_185_024, 9: 3_555_072}


def test_gradients_reach_every_prompt_and_match_finite_differences(clip, pixels):
    model = new_maple(clip, CLASSES, n=2, depth=3, vision=True, seed=1)
    # The fused attention: the other one takes its softmax in single precision, whatever it is given.
    plain = Clip(random_clip_model(attention="sdpa", vocabulary=len(clip.tokenizer)).double())
    double = MaPLe(plain, model.prompts.double(), model.token_ids)
    x = pixels.double()

    def loss():
        logits = double.logits(double.above(double.below(x, -2), -2), double.text(double.token_ids))
        return torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2]))

    loss().backward()
    for name, parameter in double.prompts.named_parameters():
        flat, gradient = parameter.data.view(-1), parameter.grad.view(-1)
        i = int(gradient.abs().argmax())
        assert gradient[i] != 0, name
        flat[i] += 1e-6
        above = loss().item()
        flat[i] -= 2e-6
        below = loss().item()
        flat[i] += 1e-6
        assert abs((above - below) / 2e-6 - gradient[i].item()) < 1e-5 * max(1, abs(gradient[i].item())), name


def test_what_follows_the_last_end_token_changes_nothing(clip):
    model = new_maple(clip, CLASSES, n=2, depth=3, vision=True, seed=1)
    ids = model.token_ids
    longer = torch.cat([ids, torch.randint(4, 90, (len(ids), 9))], 1)
    assert torch.allclose(model.text(ids), model.text(longer), atol=1e-6)


def test_names_of_other_classes(clip):
    model = new_maple(clip, CLASSES, n=2, depth=3, vision=True, seed=1)
    other = model.for_classes(["pig", "cat"])
    assert torch.allclose(other.text_features()[1], model.text_features()[0], atol=1e-6)
    assert other.prompts is model.prompts
    assert torch.allclose(model.text_features(["a photo of a pig."])[0], other.text_features()[0], atol=1e-6)


def test_saved_prompts_come_back_and_only_onto_their_shape(clip, pixels, tmp_path):
    model = new_maple(clip, CLASSES, n=2, depth=3, vision=True, seed=1)
    model.save(tmp_path)
    again = MaPLe.load(tmp_path, clip, CLASSES)
    assert again.fingerprint() == model.fingerprint()
    assert torch.equal(again.below(pixels, 2), model.below(pixels, 2))
    (tmp_path / "prompts.json").write_text('{"n": 2, "depth": 2, "vision": true}')
    with pytest.raises(ValueError, match="compound_prompt_projections.1") as error:
        MaPLe.load(tmp_path, clip, CLASSES)
    assert one_sentence(error.value)


def test_prompts_that_do_not_fit_are_one_sentence(clip):
    with pytest.raises(ValueError, match="depth 5") as error:
        new_maple(clip, CLASSES, n=2, depth=5, vision=True, seed=0)
    assert one_sentence(error.value)
    model = new_maple(clip, CLASSES, n=4, depth=1, vision=False, seed=0)
    with pytest.raises(ValueError, match="4 learned tokens") as error:
        model.text(model.token_ids[:, [0, 1, -1]])
    assert one_sentence(error.value)
