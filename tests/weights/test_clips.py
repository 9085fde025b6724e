"""CLIP in OpenAI's layout: the same model as in transformers' layout, whatever the file."""

import json
import os
import re

import pytest
import torch
from conftest import refused
from safetensors.torch import load_file, save_file
from test_foreign import Calls, zip_with
from transformers import CLIPConfig, CLIPModel

from patchsae import load_clip
from patchsae.weights.clips import BLOCK, TOWERS, TURNED, read_clip


def small_clip() -> CLIPModel:
    """Random weights whose text pooling is that of OpenAI (the largest id); towers of width 64 and 128."""
    block = {"num_hidden_layers": 2, "intermediate_size": 96, "hidden_act": "quick_gelu"}
    text = block | {"hidden_size": 64, "num_attention_heads": 1, "vocab_size": 50, "max_position_embeddings": 10,
                    "eos_token_id": 2}
    vision = block | {"hidden_size": 128, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)).eval()
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    return model


def openai_names(model: CLIPModel) -> dict:
    """The inverse of what is tested, written from the table of names alone."""
    state = {k: v for k, v in model.state_dict().items() if "position_ids" not in k}
    names, parts = {place: name for name, place in TOWERS.items()}, {theirs: own for own, theirs in BLOCK.items()}
    found = {}
    inside = re.compile(r"(vision|text)_model\.encoder\.layers\.(\d+)\.(.+)\.(\w+)")
    for key, tensor in state.items():
        if key in names:
            found[names[key]] = tensor.T.clone() if names[key] in TURNED else tensor
            continue
        side, block, part, kind = inside.fullmatch(key).groups()
        before = {"vision": "visual.transformer", "text": "transformer"}[side] + f".resblocks.{block}."
        if part == "self_attn.q_proj":
            three = [state[key.replace("q_proj", f"{p}_proj")] for p in "qkv"]
            found[f"{before}attn.in_proj_{kind}"] = torch.cat(three)
        elif part in parts:
            found[f"{before}{parts[part]}.{kind}"] = tensor
    return found


@pytest.mark.parametrize("form", ["state dict", "whole", "safetensors", "legacy"])
def test_every_file_gives_the_same_model(tmp_path, form):
    model = small_clip()
    names = openai_names(model)
    path = tmp_path / ("a.safetensors" if form == "safetensors" else "ViT-B-16.pt")
    if form == "safetensors":
        save_file({k: v.contiguous() for k, v in names.items()}, path)
    else:
        extra = names | {"input_resolution": torch.tensor(16)}
        content = {"state_dict": names, "epoch": 3} if form == "whole" else extra
        torch.save(content, path, _use_new_zipfile_serialization=form != "legacy")
    clip = load_clip(path)
    assert clip.processor.size["shortest_edge"] == clip.image_size == 16 and clip.tokenizer is None
    pixels, ids = torch.randn(3, 3, 16, 16), torch.tensor([[1, 5, 9, 49, 0, 0], [1, 7, 49, 0, 0, 0]])
    with torch.no_grad():
        expected = model.get_image_features(pixels).pooler_output
        torch.testing.assert_close(clip.above(clip.below(pixels, -2), -2), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(clip.model.get_text_features(input_ids=ids).pooler_output,
                                   model.get_text_features(input_ids=ids).pooler_output, rtol=1e-5, atol=1e-5)
    assert clip.logit_scale == model.logit_scale.exp()


class Scripted(torch.nn.Module):
    """A module that scripts to the nested names of a state dict."""

    def __init__(self, tensors: dict):
        super().__init__()
        inner = {}
        for name, tensor in tensors.items():
            first, _, rest = name.partition(".")
            inner.setdefault(first, {})[rest] = tensor
        for first, parts in inner.items():
            if "" in parts:
                self.register_parameter(first, torch.nn.Parameter(parts[""]))
            else:
                self.add_module(first, Scripted(parts))

    def forward(self, x: int) -> int:
        return x


def test_scripted_model_in_half_precision(tmp_path):
    """OpenAI publishes its weights like this."""
    model = small_clip()
    names = {name: tensor.half() for name, tensor in openai_names(model).items()}
    torch.jit.script(Scripted(names)).save(tmp_path / "ViT-B-16.pt")
    found = read_clip(tmp_path / "ViT-B-16.pt").state_dict()
    assert {t.dtype for t in found.values() if t.is_floating_point()} == {torch.float32}
    for name, tensor in model.state_dict().items():
        assert torch.equal(found[name], tensor.half().float() if tensor.is_floating_point() else tensor)


LOST = ["visual.proj", "text_projection", "visual.transformer.resblocks.1.ln_2.bias",
        "transformer.resblocks.0.attn.in_proj_weight", "logit_scale"]
NO_CLIPS = ["visual.VPT", "transformer.resblocks.0.VPT_shallow", "visual.attnpool.k_proj.weight", "x",
            "visual.transformer.resblocks.1", "visual.transformer.resblocks.one.ln_1.weight"]
CHANGES = {"dropped": lambda t: {}, "larger": lambda t: {"": torch.ones(3, *t.shape)}, "renamed": lambda t: {"s": t},
           "of no length": lambda t: {"": torch.ones(() if t.ndim else 1)},
           "no number": lambda t: {"": t * float("nan")}, "beyond float32": lambda t: {"": t.double() * 1e300}}


@pytest.mark.parametrize("name, how", [(n, how) for n in LOST for how in CHANGES] + [(n, "") for n in NO_CLIPS])
def test_damage_is_one_sentence(tmp_path, name, how):
    """A weight that no CLIP has is named, and one that is not finite in float32."""
    weights = openai_names(small_clip())
    changed = CHANGES[how](weights.pop(name)) if how else {"": torch.ones(3)}
    torch.save(weights | {f"{name}{ending}": tensor for ending, tensor in changed.items()}, tmp_path / "a.pt")
    words = "not finite in" if how in ("no number", "beyond float32") else None if how else name.split(".")[-1]
    with refused(words, ValueError):
        load_clip(tmp_path / "a.pt")


def test_records_inside_themselves_or_without_end_are_one_sentence(tmp_path):
    """What a scripted model is read as; in a tree of shared records the number of names doubles with every level."""
    inside = b"ca\nB\n)\x81q\x00}X\x01\x00\x00\x00ah\x00sb"
    shared = b"ca\nB\n)\x81q\x00" + b"".join(
        b"0ca\nB\n)\x81}(X\x01\x00\x00\x00ah\x00X\x01\x00\x00\x00bh\x00ubq\x00" for _ in range(64))
    deep = b"ca\nB\n)\x81}X\x01\x00\x00\x00a" * 5000 + b"K\x01" + b"sb" * 5000
    for code in (inside, shared, deep):
        with refused():
            load_clip(zip_with(tmp_path / "a.pt", b"\x80\x02" + code + b"."))


# Folders in the layout of transformers

@pytest.fixture
def folder(tmp_path):
    small_clip().save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def in_parts(folder, name):
    """The same weights in three files and an index; of a name's ending."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, place = sorted(weights), {}
    for part in range(3):
        stem, ending = name.split(".")
        file = f"{stem}-0000{part + 1}-of-00003.{ending}"
        place |= {key: file for key in names[part::3]}
        own = {key: weights[key] for key in names[part::3]}
        save_file(own, folder / file) if ending == "safetensors" else torch.save(own, folder / file)
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))


@pytest.mark.parametrize("form", ["bin", "legacy bin", "bin in parts", "safetensors in parts"])
def test_weights_of_every_kind_give_the_same_model(folder, form):
    expected = load_clip(folder).fingerprint()
    if form.endswith("parts"):
        in_parts(folder, "pytorch_model.bin" if form.startswith("bin") else "model.safetensors")
    else:
        weights = load_file(folder / "model.safetensors")
        weights |= {f"{side}_model.embeddings.position_ids": torch.arange(5)[None] for side in ("vision", "text")}
        (folder / "model.safetensors").unlink()
        torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=form == "bin")
    assert load_clip(folder).fingerprint() == expected
    if form.endswith("parts"):
        next(folder.glob("*-00002-*")).unlink()
        with refused():
            load_clip(folder)


@pytest.mark.parametrize("parts", [False, True])
def test_pickled_weights_that_would_run_something_are_one_sentence(folder, tmp_path, parts):
    in_parts(folder, "pytorch_model.bin")
    weights = {"logit_scale": torch.ones(()), "more": Calls(os.system, f"touch {tmp_path / 'trace'}")}
    if not parts:
        (folder / "pytorch_model.bin.index.json").unlink()
    torch.save(weights, folder / ("pytorch_model-00002-of-00003.bin" if parts else "pytorch_model.bin"))
    with refused("posix.system"):
        load_clip(folder)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("name, revision", [("openai/clip@abc", None), ("openai/clip", "abc")])
def test_names_on_the_hub_may_carry_a_revision(monkeypatch, name, revision):
    def snapshot_download(name, revision, allow_patterns):
        assert (name, revision) == ("openai/clip", "abc")
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with refused("openai/clip", FileNotFoundError):
        load_clip(name, revision=revision)
