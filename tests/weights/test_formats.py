"""Autoencoders in every format: round trips, files written by hand as others describe them, and damage."""

import json
import types
import warnings

import numpy as np
import pytest
import torch
from conftest import damaged, one_sentence, random_sae, refused
from safetensors.torch import load_file, save_file

from patchsae import SparseAutoencoder
from patchsae.studies.study import trained_sae
from patchsae.weights.formats import NAMES, file_sha256, read_sae, write_official, write_saelens

D, S = 6, 20


@pytest.fixture(autouse=True)
def _no_warnings():
    """Files without a known hash are reported by a warning; the tests of that look for it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def as_loaded(sae) -> list:
    """Bytes of the four tensors."""
    return [getattr(sae, name).detach().numpy().tobytes() for name in NAMES]


def test_round_trips_are_bit_identical(tmp_path):
    sae = random_sae(D, S)
    write_official(tmp_path / "official.pt", sae.state_dict())
    write_saelens(tmp_path / "saelens", sae.state_dict(), "openai/clip-vit-base-patch16", "blocks.10.hook_resid_post")
    sae.save_pretrained(tmp_path / "ours")
    for name in ("official.pt", "saelens", "ours"):
        again = SparseAutoencoder.from_pretrained(tmp_path / name)
        assert as_loaded(again) == as_loaded(sae)
        again.save_pretrained(tmp_path / "again")
        assert as_loaded(SparseAutoencoder.from_pretrained(str(tmp_path / "again"))) == as_loaded(sae)


def test_saelens_folder_is_what_saelens_expects(tmp_path):
    sae = random_sae(D, S)
    write_saelens(tmp_path, sae.state_dict(), "a model", "a place")
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert (config["architecture"], config["d_in"], config["d_sae"], config["dtype"]) == ("standard", D, S, "float32")
    assert config["apply_b_dec_to_input"] and config["metadata"] == {
        "sae_lens_version": "6.0.0", "model_name": "a model", "hook_name": "a place"}
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "W_enc": (D, S), "b_enc": (S,), "W_dec": (S, D), "b_dec": (D,)}


def test_push_to_hub_is_that_of_the_mixin(tmp_path, monkeypatch):
    """Everything but the upload itself happens; what would be uploaded is read again."""
    uploaded = {}

    def upload(self, *, repo_id, folder_path, **_):
        uploaded.update({p.name: p.read_bytes() for p in folder_path.iterdir()})

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi.create_repo",
                        lambda self, repo_id, **_: types.SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi.upload_folder", upload)
    sae = random_sae(D, S)
    sae.push_to_hub("someone/patchsae")
    assert set(uploaded) == {"config.json", "sae.safetensors", "README.md"}
    for name, content in uploaded.items():
        (tmp_path / name).write_bytes(content)
    assert as_loaded(SparseAutoencoder.from_pretrained(tmp_path)) == as_loaded(sae)


# Formats as described by others, written by hand

def values(dtype=torch.float32) -> dict:
    """Four tensors and, in float64 from their definition, what they make of three tokens."""
    numbers = torch.Generator().manual_seed(3)
    w = {"W_enc": torch.randn(D, S, generator=numbers), "b_enc": torch.randn(S, generator=numbers),
         "W_dec": torch.randn(S, D, generator=numbers), "b_dec": torch.randn(D, generator=numbers)}
    w["W_dec"] /= w["W_dec"].norm(dim=1, keepdim=True)
    return {name: tensor.to(dtype) for name, tensor in w.items()}


def assert_gives(sae, w, centred=True):
    """The autoencoder computes what its file says, by the definition in float64."""
    z, w = np.random.default_rng(5).normal(size=(3, D)), {name: t.double().numpy() for name, t in w.items()}
    h = np.maximum((z - w["b_dec"] * centred) @ w["W_enc"] + w["b_enc"], 0)
    with torch.no_grad():
        found = sae.encode(torch.tensor(z, dtype=torch.float32))
        np.testing.assert_allclose(found.numpy(), h, atol=1e-5)
        np.testing.assert_allclose(sae.decode(found).numpy(), h @ w["W_dec"] + w["b_dec"], atol=1e-5)


@pytest.mark.parametrize("entry", ["cfg", "config"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_official_file(tmp_path, entry, dtype):
    config, w = types.SimpleNamespace(d_in=D, lr=4e-4, device=torch.device("cuda")), values(dtype)
    torch.save({entry: config, "state_dict": w}, tmp_path / "out.pt")
    sae = SparseAutoencoder.from_pretrained(tmp_path / "out.pt")
    assert {p.dtype for p in sae.parameters()} == {torch.float32}
    assert_gives(sae, w)
    assert sae.report["sha256"] == file_sha256(tmp_path / "out.pt") and not sae.report["verified"]
    assert sae.report["dtype"] == str(dtype) and sae.report["unit_rows"]


@pytest.mark.parametrize("inside", ["", "final"])
@pytest.mark.parametrize("name", ["model.pt", "state_dict.pth", "pytorch_model.bin", "weights.safetensors"])
@pytest.mark.parametrize("prefix", ["", "sae."])
def test_fastsae_folder(tmp_path, inside, name, prefix):
    folder = tmp_path / "run" / inside
    folder.mkdir(parents=True)
    w = values()
    stored = {prefix + key: tensor.contiguous() for key, tensor in w.items()}
    save_file(stored, folder / name) if name.endswith("safetensors") else torch.save(stored, folder / name)
    torch.save({"state": {}}, folder / "optimizer.pt")
    (folder / "history.json").write_text("[1, 2]")
    (folder / "config.json").write_text(json.dumps({"d_in": D, "activation_name": "relu"}))
    assert_gives(SparseAutoencoder.from_pretrained(tmp_path / "run"), w)


def test_fastsae_decoder_tied_at_the_start_is_read(tmp_path):
    w = values()
    w["W_dec"] = w["W_enc"].clone().transpose(0, 1)  # a view with other strides, as that code saves it
    torch.save(w, tmp_path / "model.pt")
    sae = SparseAutoencoder.from_pretrained(tmp_path)
    assert_gives(sae, w)
    assert not sae.report["unit_rows"] and sae.report["row_norms"][0] < sae.report["row_norms"][1]


@pytest.mark.parametrize("centred", [True, False])
def test_saelens_folder(tmp_path, centred):
    w = values()
    save_file(w, tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps({
        "architecture": "standard", "d_in": D, "d_sae": S, "dtype": "float32", "device": "cuda",
        "apply_b_dec_to_input": centred, "normalize_activations": "none", "metadata": {"hook_name": "x"}}))
    assert_gives(SparseAutoencoder.from_pretrained(tmp_path), w, centred)


@pytest.mark.parametrize("changes", [
    {"architecture": "jumprelu"}, {"normalize_activations": "layer_norm"}, {"activation_fn_str": "topk"},
    {"activation_fn_str": "tanh-relu"}, {"architecture": "gated"}, {"apply_b_dec_to_input": "false"},
    {"reshape_activations": "hook_z"}, {"d_sae": S + 1}, {"d_in": None}, {"rescale_acts_by_decoder_norm": True}])
def test_saelens_settings_with_other_equations_are_refused_whatever_the_file_is_called(tmp_path, changes):
    write_saelens(tmp_path, random_sae(D, S), "m", "h")
    config = json.loads((tmp_path / "cfg.json").read_text()) | changes
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    with refused():
        read_sae(tmp_path)
    (tmp_path / "sae_weights.safetensors").rename(tmp_path / "weights.safetensors")
    with refused():
        read_sae(tmp_path / "weights.safetensors")


def test_latents_that_saelens_rescales_are_what_it_computes(tmp_path):
    """By its definition: pre-activations times the norms of the decoder's rows, the k largest, divided again."""
    w, z = values(), np.random.default_rng(5).normal(size=(9, D))
    for lengths in (torch.ones(S), torch.rand(S, generator=torch.Generator().manual_seed(1)) + 0.1):
        w["W_dec"] = torch.nn.functional.normalize(w["W_dec"], dim=1) * lengths[:, None]
        save_file(w, tmp_path / "sae_weights.safetensors")
        (tmp_path / "cfg.json").write_text(json.dumps({
            "architecture": "topk", "k": 4, "d_in": D, "d_sae": S, "rescale_acts_by_decoder_norm": True}))
        numbers = {name: tensor.double().numpy() for name, tensor in w.items()}
        norms = np.linalg.norm(numbers["W_dec"], axis=1)
        pre = ((z - numbers["b_dec"]) @ numbers["W_enc"] + numbers["b_enc"]) * norms
        h = np.where(pre >= np.sort(pre, axis=1)[:, [-4]], np.maximum(pre, 0), 0)
        sae = SparseAutoencoder.from_pretrained(tmp_path)
        found = sae.encode(torch.tensor(z).float())
        np.testing.assert_allclose(found.detach(), h, atol=1e-5)
        z_hat = (h / norms) @ numbers["W_dec"] + numbers["b_dec"]
        np.testing.assert_allclose(sae.decode(found).detach(), z_hat, atol=1e-5)


@pytest.mark.parametrize("name, beside", [("sae_weights.safetensors", "cfg.json"), ("sae.safetensors", "config.json")])
def test_weights_without_the_settings_that_belong_to_them_are_refused(tmp_path, name, beside):
    sae, z = SparseAutoencoder(D, S, activation="topk", k=3), torch.randn(5, D)
    if beside == "cfg.json":
        write_saelens(tmp_path, sae, "m", "h")
    else:
        sae.save_pretrained(tmp_path)
    assert torch.equal(SparseAutoencoder.from_pretrained(tmp_path / name).encode(z), sae.encode(z))
    (tmp_path / beside).write_text((tmp_path / beside).read_text()[:-9])
    for lost in (False, True):
        if lost:
            (tmp_path / beside).unlink()
        for path in (tmp_path, tmp_path / name):
            with refused(beside):
                read_sae(path)


def test_a_scale_of_one_is_no_weight(tmp_path):
    """Versions of SAELens before 6 wrote one; any other number makes another function."""
    write_saelens(tmp_path, random_sae(D, S), "m", "h")
    w = load_file(tmp_path / "sae_weights.safetensors")
    more = {"scaling_factor": torch.ones(S), "steps": torch.tensor(3)}
    save_file(w | more, tmp_path / "sae_weights.safetensors")
    assert_gives(SparseAutoencoder.from_pretrained(tmp_path), w)
    save_file(w | {"scaling_factor": 2 * torch.ones(S)}, tmp_path / "sae_weights.safetensors")
    with refused("scaling_factor"):
        read_sae(tmp_path)


FASTSAE = {"class_type": "VanillaSAE", "d_in": D, "d_sae_factor": 4, "architecture": "vanilla",
           "activation_name": "relu"}


@pytest.mark.parametrize("text", [
    json.dumps(FASTSAE | changes) for changes in ({"d_in": D + 1}, {"d_sae_factor": 3}, {"architecture": "gated"},
                                                  {"activation_name": "gelu"}, {"activation_name": "softplus"})
] + [json.dumps(FASTSAE)[:-20], "{"])
@pytest.mark.parametrize("given", ["run", "run/final", "run/final/model.pt"])
@pytest.mark.parametrize("around", [False, True], ids=["beside", "around"])
def test_fastsae_is_what_its_settings_say(tmp_path, text, given, around):
    w = {"W_enc": torch.randn(D, 4 * D), "b_enc": torch.randn(4 * D), "W_dec": torch.randn(4 * D, D),
         "b_dec": torch.randn(D)}
    folder = tmp_path / "run" / "final"
    folder.mkdir(parents=True)
    torch.save(w, folder / "model.pt")
    settings = (folder.parent if around else folder) / "vanilla_sae_config.json"
    (folder / "backbone_config.json").write_text('{"model_hf_name": "clip", "architecture": "any"}')
    settings.write_text(json.dumps(FASTSAE))
    assert_gives(SparseAutoencoder.from_pretrained(tmp_path / given), w)
    assert read_sae(tmp_path / given)[1]["format"] == "FastSAE folder"
    settings.write_text(text)
    with refused():
        read_sae(tmp_path / given)


@pytest.mark.parametrize("changes, more", [
    ({"gated_sae": True}, ()), ({}, ("r_mag", "b_mag")), ({"gated_sae": True}, ("r_mag", "b_mag")),
    ({"gated_sae": torch.ones(2)}, ()), ({"d_in": D + 1}, ()), ({"d_sae": S + 1}, ()), ({"d_sae": None}, ()),
    ({"d_in": torch.tensor([D, D])}, ())])
@pytest.mark.parametrize("entry", ["cfg", "config"])
@pytest.mark.parametrize("kind", [dict, lambda **fields: types.SimpleNamespace(**fields)], ids=["dict", "object"])
def test_official_files_are_what_their_cfg_says(tmp_path, changes, more, entry, kind):
    w = values()
    plain = {"d_in": D, "d_sae": S, "gated_sae": False}
    torch.save({entry: kind(**plain), "state_dict": w}, tmp_path / "out.pt")
    (tmp_path / "other.json").write_text('{"activation_name": "gelu"')  # of somebody else
    assert_gives(SparseAutoencoder.from_pretrained(tmp_path / "out.pt"), w)
    torch.save({entry: kind(**plain | changes), "state_dict": w | {name: torch.zeros(S) for name in more}},
               tmp_path / "out.pt")
    with refused():
        read_sae(tmp_path / "out.pt")


class Node:
    """A settings object that holds others."""


@pytest.mark.parametrize("place", ["d_in", "gated_sae", "cfg", "key", "state_dict", "beside"])
def test_settings_inside_each_other_are_one_sentence_or_ignored(tmp_path, place):
    """To write out what is shared on 64 levels would take for ever."""
    node = Node()
    node.itself = node
    for _ in range(64):
        around = Node()
        around.left = around.right = node
        node = around
    w = values()
    config = {"d_in": D, "d_sae": S} | ({place: node} if place in ("d_in", "gated_sae") else {})
    content = {"cfg": node if place == "cfg" else config, "state_dict": node if place == "state_dict" else w}
    if place in ("key", "beside"):
        (w if place == "key" else content)[node] = node
    torch.save(content, tmp_path / "out.pt")
    w.pop(node, None)
    if place in ("cfg", "key", "beside"):
        assert_gives(SparseAutoencoder.from_pretrained(tmp_path / "out.pt"), w)
        return
    with refused():
        read_sae(tmp_path / "out.pt")


def test_the_official_writer_gives_the_authors_loader_what_it_asks_for(tmp_path):
    """Their constructor reads these settings before it takes the weights; the file is unpickled as they do."""
    write_official(tmp_path / "out.pt", random_sae(D, S))
    content = torch.load(tmp_path / "out.pt", weights_only=False)
    config = content["cfg"]
    assert (config.d_in, config.d_sae, config.dtype, config.gated_sae) == (D, S, torch.float32, False)
    assert isinstance(config.l1_coefficient, float) and isinstance(config.use_ghost_grads, bool)
    assert set(content["state_dict"]) == set(NAMES)


def test_plain_mixin_folder(tmp_path):
    w = values()
    save_file(w, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"d_model": D, "n_latents": S}))
    assert_gives(SparseAutoencoder.from_pretrained(tmp_path), w)


def test_a_file_without_a_known_hash_is_reported(tmp_path):
    write_official(tmp_path / "a.pt", random_sae(D, S).state_dict())
    with pytest.warns(UserWarning, match=f"unverified.*{file_sha256(tmp_path / 'a.pt')}"):
        SparseAutoencoder.from_pretrained(tmp_path / "a.pt")
    random_sae(D, S).save_pretrained(tmp_path / "ours")
    assert SparseAutoencoder.from_pretrained(tmp_path / "ours").report["verified"]


def test_a_profile_can_name_given_weights(tmp_path, clip, image_data, profile):
    """They are used as they are, and belong to the profile's own layer and settings alone."""
    w = {"W_enc": torch.randn(clip.width, S), "b_enc": torch.randn(S), "W_dec": torch.randn(S, clip.width),
         "b_dec": torch.randn(clip.width)}
    torch.save({"cfg": None, "state_dict": w}, tmp_path / "out.pt")
    given = profile.with_sae(weights=str(tmp_path / "out.pt"))
    sae = trained_sae(given, clip, image_data)
    assert all(torch.equal(getattr(sae, name), w[name]) for name in NAMES)
    assert not given.at_layer(0).sae.weights and not given.with_sae(tokens="cls").sae.weights
    assert given.sae_settings()["sae"]["weights"] and "weights" not in profile.sae_settings()["sae"]
    torch.save({"state_dict": values()}, tmp_path / "narrow.pt")
    with refused():
        trained_sae(profile.with_sae(weights=str(tmp_path / "narrow.pt")), clip, image_data)


# Damage

#: What is wrong -> what stands in the place of some weights; None: nothing.
WRONG = {
    **{f"no {name}": lambda w, name=name: {name: None} for name in NAMES},
    "transposed": lambda w: {"W_enc": w["W_enc"].T.contiguous()}, "cut": lambda w: {"b_enc": w["b_enc"][:-1]},
    "integers": lambda w: {"W_dec": w["W_dec"].int()}, "twice": lambda w: {"other.W_enc": w["W_enc"].clone()},
    "not finite": lambda w: {"b_dec": w["b_dec"] * float("nan")},
    "not finite in W_enc": lambda w: {"W_enc": w["W_enc"].double() / 0},
    "not finite in b_enc": lambda w: {"b_enc": w["b_enc"].double() * 1e300},
    "zeros": lambda w: {"W_dec": w["W_dec"] * 0}, "lists": lambda w: {name: w[name].tolist() for name in NAMES},
    "empty": lambda w: {name: w[name][:0].clone() if w[name].ndim == 1 else torch.empty(0, 0) for name in NAMES}}


@pytest.mark.parametrize("how", WRONG)
@pytest.mark.parametrize("form", ["official.pt", "final", "alone.safetensors", "saelens"])
def test_wrong_weights_are_one_sentence(tmp_path, how, form):
    w = {name: tensor for name, tensor in (values() | WRONG[how](values())).items() if tensor is not None}
    path = tmp_path / form
    if how == "lists" and form in ("alone.safetensors", "saelens"):
        return
    if form == "saelens":
        write_saelens(path, values(), "m", "h")
        save_file(w, path / "sae_weights.safetensors")
    elif form == "alone.safetensors":
        save_file(w, path)
    elif form == "official.pt":
        torch.save({"cfg": None, "state_dict": w}, path)
    else:
        path.mkdir()
        torch.save(w, path / "a.pt")
    with refused(how if how.startswith(("not", "zeros")) else None):
        SparseAutoencoder.from_pretrained(path)


@pytest.mark.parametrize("form", ["official", "ours", "saelens"])
def test_flipped_bytes_are_found_or_one_sentence(tmp_path, form):
    """Where a hash or checksum is known no flipped bit goes unseen; a SAELens folder has none."""
    sae, numbers, path = random_sae(D, S), np.random.default_rng(1), tmp_path / form
    if form == "official":
        write_official(path, sae.state_dict())
    elif form == "ours":
        sae.save_pretrained(path)
    else:
        write_saelens(path, sae.state_dict(), "m", "h")
    files = sorted(p for p in ([path] if path.is_file() else path.iterdir()))
    for trial in range(120):
        file = files[trial % len(files)]
        good = file.read_bytes()
        file.write_bytes(damaged(good, numbers, cut=trial % 4 == 0))
        try:
            found = SparseAutoencoder.from_pretrained(path)
            assert form == "saelens" or as_loaded(found) == as_loaded(sae)
        except (ValueError, OSError) as error:
            assert one_sentence(error), error
        file.write_bytes(good)


def test_other_paths_are_one_sentence(tmp_path):
    for folder, names in (("two", ("a.pt", "b.pt")), ("gelu", ("a.pt",))):
        (tmp_path / folder).mkdir()
        for name in names:
            torch.save(values(), tmp_path / folder / name)
    (tmp_path / "gelu" / "config_sae.json").write_text('{"activation_name": "gelu"}')
    torch.save({"state_dict": [1]}, tmp_path / "list.pt")
    for path in (tmp_path / "two", tmp_path / "gelu", tmp_path, tmp_path / "list.pt", "no/such/name/at/all"):
        with refused():
            SparseAutoencoder.from_pretrained(path)


@pytest.mark.parametrize("write", [lambda path, sae: write_official(path / "out.pt", sae),
                                   lambda path, sae: write_saelens(path / "folder", sae, "clip", "blocks.10")])
def test_an_activation_that_a_format_does_not_have_is_refused(tmp_path, write):
    toy = types.SimpleNamespace(state_dict=random_sae(D, S).state_dict, activation="toy", k=0)
    with pytest.raises(ValueError, match="has no toy") as error:
        write(tmp_path, toy)
    assert one_sentence(error.value) and not list(tmp_path.rglob("*.*"))
