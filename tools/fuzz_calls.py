"""What ``tools/fuzz.py`` mutates: a valid call of every public function, on a tiny CLIP and autoencoder."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from conftest import SIDE, WIDTH, picture, random_clip_model, random_sae, save_picture, tiny_processor  # noqa: E402
from maple_twin import state_dict  # noqa: E402

from patchsae import ArrayDataset, SparseAutoencoder, collect_latents, load_profile, write_cache  # noqa: E402
from patchsae.ablation import Setup, make_arm  # noqa: E402
from patchsae.activations import load_pixels  # noqa: E402
from patchsae.clip import Clip  # noqa: E402
from patchsae.data.adapters import TorchImages  # noqa: E402
from patchsae.data.datasets import FolderDataset, Subset  # noqa: E402
from patchsae.data.images import HubDataset  # noqa: E402
from patchsae.latents import Question  # noqa: E402
from patchsae.maple import class_tokens, new_maple  # noqa: E402
from patchsae.studies.study import Study  # noqa: E402
from patchsae.train import Training  # noqa: E402
from patchsae.variants import KINDS  # noqa: E402
from patchsae.world.pretrain import build_tokenizer  # noqa: E402

LAYER, NAMES, K = -2, ("cat", "dog", "pig"), 5
LATENTS = 20


class Scenes(ArrayDataset):
    """Images with ground truth."""

    concepts = {"kind": ("round", "flat"), "colour": ("red",)}

    def scene(self, i: int):
        """An image that knows the share of each patch that each concept covers."""
        return self

    def coverage(self, kind: str) -> np.ndarray:
        """float32 ``[grid,grid,concepts]``."""
        return np.full((2, 2, len(self.concepts[kind])), 0.5, np.float32)


class World:
    """Small things to call functions with; what a call may change is made anew each time."""

    def __init__(self, folder: Path):
        self.folder, tokenizer = folder, build_tokenizer()
        self.clip = Clip(random_clip_model(vocabulary=len(tokenizer)), tokenizer, tiny_processor())
        self.images = np.random.default_rng(0).integers(0, 256, (12, SIDE, SIDE, 3), dtype=np.uint8)
        self.z = self.clip.below(self.clip.pixels(self.images[:4]), LAYER)
        self.maple = new_maple(self.clip, NAMES, 2, 2, True, 0)
        self.lat = collect_latents(self.clip, self.sae(), self.ds, LAYER, 0.1, 3)
        self.text = self.clip.text_features(list(NAMES))
        mini = load_profile("mini").with_sae(expansion=2, batch_images=4, steps=3, save_every=2, warmup=2, l1=0.02)
        model = dataclasses.replace(mini.model, name=str(folder / "clip"))
        data = dataclasses.replace(mini.data, source="folders", images=str(folder / "images"), task="animals",
                                   train_images=8, test_images=8, batch_images=4)
        self.profile = dataclasses.replace(mini, model=model, data=data, bounds={"gain": 0.0})
        self.files()

    def files(self) -> None:
        """Write each kind of file and folder that is read."""
        self.clip.model.save_pretrained(self.folder / "clip")
        self.clip.tokenizer.save_pretrained(self.folder / "clip")
        self.clip.processor.save_pretrained(self.folder / "clip")
        self.sae().save_pretrained(self.folder / "sae")
        self.maple.save(self.folder / "maple")
        self.lat.save(self.folder / "latents")
        self.training().save(self.folder / "checkpoint")
        write_cache(self.clip, self.ds, LAYER, self.folder / "cache", batch_images=4)
        for i, name in enumerate(NAMES * 4):
            save_picture(self.folder / "images" / name / f"{i}.png", picture(i, (SIDE, SIDE, 3)))
        FolderDataset(self.folder / "images").fingerprint()  # which keeps hashes there

    @property
    def ds(self) -> Scenes:
        """12 images of 3 classes."""
        return Scenes(self.images.copy(), np.arange(12) % 3, class_names=NAMES)

    @property
    def pixels(self) -> torch.Tensor:
        """Four of them, preprocessed."""
        return self.clip.pixels(self.images[:4])

    def sae(self, activation: str = "relu") -> SparseAutoencoder:
        """A random autoencoder."""
        if activation == "relu":
            return random_sae(n_latents=LATENTS)
        return KINDS[activation](WIDTH, LATENTS, torch.Generator().manual_seed(0), activation, K)

    def training(self) -> Training:
        """One that has taken a step."""
        training = Training(self.sae(), dead_after=2)
        training.step(self.z)
        return training

    def study(self) -> Study:
        """A profile, opened."""
        study = Study(self.profile)
        study.clip, study.sae = self.clip, self.sae()
        return study

    def loss(self, activation: str = "relu", **more) -> dict:
        """Arguments of what revives dead latents."""
        z, sae = self.z, self.sae(activation)
        pre = sae.pre_activations(z)
        z_hat = sae(z)
        return {"z": z, "z_hat": z_hat, "m": (z - z_hat).square(), "pre": pre,
                "dead": torch.arange(LATENTS) % 2 == 0} | more

    def table(self) -> list:
        """Images as a column of a table has them."""
        return [{"image": {"bytes": None, "path": str(path)}} for path in sorted(self.folder.glob("images/*/*.png"))]


class Pairs(torch.utils.data.Dataset):
    """A data set of torch."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i], i % 2


def _methods(activation: str) -> dict:
    """Valid calls of what an autoencoder computes."""
    def of(**arguments):
        return lambda w: {"self": w.sae(activation)} | {k: v(w) if callable(v) else v for k, v in arguments.items()}

    def pre(w):
        return w.sae(activation).pre_activations(w.z)

    def h(w):
        return torch.relu(pre(w)).detach()

    def revived(w):
        return {"self": w.sae(activation), "latents": torch.arange(LATENTS)} | w.loss(activation)

    return {"encode": of(z=lambda w: w.z), "decode": of(h=h), "forward": of(z=lambda w: w.z),
            "pre_activations": of(z=lambda w: w.z), "encode_some": of(z=lambda w: w.z, latents=[0, 3]),
            "prepare": of(k=3), "activate": of(pre=pre), "activate_in_training": of(pre=pre), "after_step": of(h=h),
            "error": of(z=lambda w: w.z, h=h, m=lambda w: w.z.square()), "sparsity": of(pre=pre, h=h),
            "revive": revived,
            "losses": of(z=lambda w: w.z, l1=0.1, dead=lambda w: torch.arange(LATENTS) > 3, candidates=None)}


def _autoencoder(d_model=WIDTH, n_latents=LATENTS, k=3):
    return lambda w: {"d_model": d_model, "n_latents": n_latents, "generator": torch.Generator().manual_seed(0), "k": k}


#: Room and name -> the arguments of a valid call.
CALLS = {
    "clip.Clip": lambda w: {"model": random_clip_model(), "tokenizer": w.clip.tokenizer, "processor": None},
    "clip.Clip.block": lambda w: {"self": w.clip, "layer": LAYER},
    "clip.Clip.below": lambda w: {"self": w.clip, "pixels": w.pixels, "layer": LAYER},
    "clip.Clip.between": lambda w: {"self": w.clip, "z": w.z, "layer": 1, "later": LAYER},
    "clip.Clip.above": lambda w: {"self": w.clip, "z": w.z, "layer": LAYER},
    "clip.Clip.embed": lambda w: {"self": w.clip, "pixels": w.pixels},
    "clip.Clip.before_block": lambda w: {"self": w.clip, "z": w.z, "i": 2},
    "clip.Clip.pixels": lambda w: {"self": w.clip, "images": w.images[:4]},
    "clip.Clip.normalise": lambda w: {"self": w.clip, "crops": torch.from_numpy(w.images[:4])},
    "clip.Clip.text_features": lambda w: {"self": w.clip, "prompts": ["a cat", "a dog"], "batch": 3},
    "clip.Clip.tokenise": lambda w: {"self": w.clip, "prompts": ["a cat", "a dog"]},
    "clip.Clip.logits": lambda w: {"self": w.clip, "embeddings": w.text[:2] * 2, "text": w.text},
    "clip.Clip.fingerprint": lambda w: {"self": w.clip},
    "clip.Clip.preprocessing": lambda w: {"self": w.clip},
    "clip.load_clip": lambda w: {"name_or_path": w.folder / "clip", "device": "cpu", "revision": None},
    "clip.class_prototypes": lambda w: {"clip": w.clip, "class_names": NAMES, "templates": ["a {}.", "the {}."],
                                        "renormalise": False},
    "clip.contrastive_loss": lambda w: {"images": w.text, "texts": w.text.flip(0), "groups": torch.arange(3),
                                        "scale": 2.0},
    "maple.Prompts": lambda w: {"n": 2, "depth": 3, "text_width": 12, "vision_width": 12},
    "maple.Prompts.initialise": lambda w: {"self": new_maple(w.clip, NAMES, 2, 2, True, 0).prompts,
                                           "first_words": torch.ones(2, WIDTH), "seed": 3},
    "maple.Prompts.text": lambda w: {"self": w.maple.prompts, "block": 1},
    "maple.Prompts.image": lambda w: {"self": w.maple.prompts, "block": 1},
    "maple.MaPLe": lambda w: {"clip": w.clip, "prompts": w.maple.prompts, "token_ids": class_tokens(w.clip, NAMES),
                              "template": "a {}."},
    "maple.MaPLe.embed": lambda w: {"self": w.maple, "pixels": w.pixels},
    "maple.MaPLe.before_block": lambda w: {"self": w.maple, "z": w.maple.below(w.pixels, 0), "i": 1},
    "maple.MaPLe.text_features": lambda w: {"self": w.maple, "prompts": ["a photo of a cat."], "batch": 3},
    "maple.MaPLe.text": lambda w: {"self": w.maple, "ids": class_tokens(w.clip, NAMES)},
    "maple.MaPLe.fingerprint": lambda w: {"self": w.maple},
    "maple.MaPLe.without_prompts": lambda w: {"self": w.maple},
    "maple.MaPLe.for_classes": lambda w: {"self": w.maple, "class_names": ("owl", "duck")},
    "maple.MaPLe.save": lambda w: {"self": w.maple, "folder": w.folder / "new" / "maple"},
    "maple.MaPLe.load": lambda w: {"folder": w.folder / "maple", "clip": w.clip, "class_names": NAMES},
    "maple.MaPLe.from_official": lambda w: dict(zip(("checkpoint", "token_embedding"), state_dict()))
    | {"token_ids": torch.tensor([[98, 5, 6, 7, 8, 99]]), "class_names": None, "clip": None, "depth": 3},
    "maple.template_of": lambda w: {"n": 6},
    "maple.class_tokens": lambda w: {"clip": w.clip, "class_names": NAMES, "template": "the {}."},
    "maple.new_maple": lambda w: {"clip": w.clip, "class_names": NAMES, "n": 2, "depth": 2, "vision": False, "seed": 3},
    "maple.empty_prompts": lambda w: {"clip": w.clip, "n": 2, "depth": 2, "vision": False},
    "sae.SparseAutoencoder": lambda w: _autoencoder()(w) | {"activation": "relu"},
    **{f"sae.SparseAutoencoder.{name}": call for name, call in _methods("relu").items()},
    "sae.SparseAutoencoder.normalise_decoder": lambda w: {"self": w.sae()},
    "sae.SparseAutoencoder.remove_parallel_gradient": lambda w: {"self": w.training().sae},
    "sae.SparseAutoencoder.fingerprint": lambda w: {"self": w.sae()},
    "sae.SparseAutoencoder.save_pretrained": lambda w: {"self": w.sae(), "folder": w.folder / "new" / "sae"},
    "sae.SparseAutoencoder.from_pretrained": lambda w: {"path": w.folder / "sae", "device": "cpu", "revision": None},
    "sae.sae_loss": lambda w: {"sae": w.sae(), "z": w.z, "l1": 0.1, "dead": torch.arange(LATENTS) > 3,
                               "candidates": torch.arange(LATENTS)},
    "sae.reconstruction_error": lambda w: {"z": w.z, "z_hat": w.z * 2},
    "sae.ghost_loss": lambda w: w.loss(rows=w.sae().W_dec.detach()),
    **{f"variants.{KINDS[a].__name__}": _autoencoder() for a in KINDS if a != "relu"},
    **{f"variants.{KINDS[a].__name__}.{name}": call for a in KINDS for name, call in _methods(a).items()
       if a != "relu" and name in vars(KINDS[a])},
    "variants.auxiliary_loss": lambda w: {k: v for k, v in w.loss(rows=w.sae().W_dec.detach(), k=3).items()
                                          if k != "m"},
    "variants.top_k": lambda w: {"pre": w.z, "k": 3},
    "variants.batch_top_k": lambda w: {"pre": w.z, "k": 3},
    "variants.prefixes": lambda w: {"n_latents": 40},
    "activations.load_pixels": lambda w: {"clip": w.clip, "ds": w.ds, "rows": [0, 5]},
    "activations.read_pixels": lambda w: {"clip": w.clip, "ds": w.ds, "batches": [np.arange(3), np.arange(5)]},
    "activations.refuse_not_finite": lambda w: {"x": w.z, "ids": list("abcd"), "rows": np.arange(4), "what": "gives",
                                                "advice": "look"},
    "activations.pixel_batches": lambda w: {"clip": w.clip, "ds": w.ds, "batch_images": 5, "title": ""},
    "activations.token_batches": lambda w: {"clip": w.clip, "ds": w.ds, "layer": LAYER, "batch_images": 5, "title": ""},
    "activations.finite_tokens": lambda w: {"clip": w.clip, "batch": load_pixels(w.clip, w.ds, [0, 5]),
                                            "layers": [LAYER, 0]},
    "activations.tokens_at": lambda w: {"clip": w.clip, "pixels": w.pixels, "layers": [LAYER, 0]},
    "activations.kept_pixels": lambda w: {"clip": w.clip, "ds": w.ds},
    "cache.made_of": lambda w: {"clip": w.clip, "ds": w.ds, "layer": LAYER},
    "cache.cache_folder": lambda w: {"profile": w.profile, "clip": w.clip, "ds": w.ds},
    "cache.cache_bytes": lambda w: {"clip": w.clip, "n_images": 7},
    "cache.open_cache": lambda w: {"folder": w.folder / "cache", "clip": w.clip, "ds": w.ds, "layer": LAYER},
    "cache.profile_cache": lambda w: {"profile": w.profile, "clip": w.clip, "ds": w.ds},
    "cache.Cache": lambda w: {"folder": w.folder / "cache", "expected": {}},
    "cache.Cache.batches": lambda w: {"self": _cache(w), "rows": [np.arange(3), np.arange(5)], "device": "cpu",
                                      "threads": 2},
    "cache.Cache.verify": lambda w: {"self": _cache(w)},
    "cache.write_cache": lambda w: {"clip": w.clip, "ds": w.ds, "layer": LAYER, "folder": w.folder / "new" / "cache",
                                    "dtype": torch.float16, "most_bytes": 1e9, "batch_images": 4},
    "cache.free_bytes": lambda w: {"folder": w.folder / "images"},
    "cache.gigabytes": lambda w: {"n": 2e9},
    "train.Training": lambda w: {"sae": w.sae(), "lr": 0.1, "l1": 0.1, "warmup": 3, "dead_after": 5, "ghost": False,
                                 "precision": "float32"},
    "train.Training.step": lambda w: {"self": w.training(), "z": w.z},
    "train.Training.look": lambda w: {"self": w.training()},
    "train.Training.make_room": lambda w: {"self": w.training(), "times": 3},
    "train.Training.trained": lambda w: {"self": w.training()},
    "train.Training.tensors": lambda w: {"self": w.training()},
    "train.Training.save": lambda w: {"self": w.training(), "folder": w.folder / "new" / "checkpoint"},
    "train.Training.resume": lambda w: {"self": Training(w.sae()), "folder": w.folder / "checkpoint"},
    "train.train_steps": lambda w: {"sae": w.sae(), "batches": [w.z, w.z], "lr": 0.1, "l1": 0.1, "warmup": 3,
                                    "dead_after": 5, "ghost": False},
    "train.training_batches": lambda w: {"profiles": [w.profile], "clip": w.clip, "ds": w.ds, "steps": range(2, 4)},
    "train.rides": lambda w: {"profile": w.profile},
    "train.new_saes": lambda w: {"profiles": [w.profile], "clip": w.clip, "ds": w.ds},
    "train.run_key": lambda w: {"profile": w.profile, "clip": w.clip},
    "train.train_sae": lambda w: {"profile": w.profile, "clip": w.clip, "ds": w.ds, "folder": w.folder / "new" / "run"},
    "train.train_saes": lambda w: {"profiles": [w.profile], "clip": w.clip, "ds": w.ds,
                                   "folders": [w.folder / "new" / "run"]},
    "latents.LatentStatistics": lambda w: {f.name: getattr(w.lat, f.name) for f in dataclasses.fields(w.lat)},
    "latents.LatentStatistics.table": lambda w: {"self": w.lat},
    "latents.LatentStatistics.save": lambda w: {"self": w.lat, "folder": w.folder / "new" / "latents"},
    "latents.LatentStatistics.load": lambda w: {"folder": w.folder / "latents"},
    "latents.Question": lambda w: {"clip": w.clip, "sae": w.sae(), "layer": LAYER, "tokens": "cls"},
    "latents.collect_latents": lambda w: {"clip": w.clip, "sae": w.sae(), "ds": w.ds, "layer": LAYER, "tau": 0.1,
                                          "n_reference": 3, "batch_images": 5, "tokens": "cls"},
    "latents.collect_many": lambda w: {"questions": _questions(w), "ds": w.ds, "tau": 0.1, "n_reference": 3,
                                       "batch_images": 5, "title": ""},
    "latents.saved_latents": lambda w: {"folder": w.folder / "new", "questions": _questions(w), "ds": w.ds, "tau": 0.1,
                                        "n_reference": 3, "batch_images": 5},
    "latents.label_entropy": lambda w: {"labels": w.lat.reference_labels, "values": w.lat.reference_values,
                                        "n_classes": 3},
    "masks.heat_maps": lambda w: {"clip": w.clip, "sae": w.sae(), "pixels": w.pixels, "layer": LAYER,
                                  "latents": [0, 3]},
    "masks.enlarge": lambda w: {"heat": np.eye(2), "size": 6},
    "masks.soft_mask": lambda w: {"image": w.images[0], "heat": np.eye(2)},
    "masks.concept_list": lambda w: {"ds": w.ds, "kinds": ["kind"]},
    "masks.patch_concepts": lambda w: {"ds": w.ds, "rows": [0, 5], "kinds": ["kind"]},
    "masks.patch_coverage": lambda w: {"ds": w.ds, "rows": [0, 5], "kinds": ["kind"]},
    "masks.overlap": lambda w: {"mask": np.eye(3) > 0, "truth": np.ones((3, 3)) > 0},
    "ablation.descending": lambda w: {"counts": torch.tensor([3, 1, 2])},
    "ablation.class_order": lambda w: {"lat": w.lat},
    "ablation.dataset_order": lambda w: {"lat": w.lat},
    "ablation.random_order": lambda w: {"lat": w.lat, "seed": 3},
    "ablation.unshared_order": lambda w: {"lat": w.lat},
    "ablation.matched_order": lambda w: {"lat": w.lat, "seed": 3, "depth": 4},
    "ablation.wrong_classes": lambda w: {"classes": [0, 1, 2], "seed": 3},
    "ablation.make_arm": lambda w: {"lat": w.lat, "selection": "matched", "seed": 3, "ks": [1, 4], "ranking": None},
    "ablation.masked_tokens": lambda w: {"sae": w.sae(), "z": w.z, "sums": w.z[:, None].repeat(1, 3, 1, 1),
                                         "add_error": False},
    "ablation.masked_logits": lambda w: {"setup": _setup(w), "ds": w.ds, "batch_images": 5, "title": ""},
    "ablation.batch_logits": lambda w: {"setup": _setup(w), "z": w.z, "labels": [0, 1, 2, 0]},
    "ablation.topk_masking": lambda w: {"clip": w.clip, "sae": w.sae(), "ds": w.ds, "lat": w.lat,
                                        "text_features": w.text, "layer": LAYER, "ks": [1, 4], "selection": ["random"],
                                        "ranking": torch.arange(LATENTS).repeat(3, 1), "add_error": False,
                                        "per_image": False, "seed": [3, 4], "batch_images": 5, "title": ""},
    "config.as_path": lambda w: {"path": w.folder / "clip"},
    "config.resolve": lambda w: {"path": w.folder / "clip"},
    "config.MethodSettings.epochs_of": lambda w: {"self": w.profile.maple, "images": 64},
    "config.Profile.short": lambda w: {"self": w.profile, "path": w.folder / "sae"},
    "config.Profile.expected": lambda w: {"self": w.profile, "name": "gain", "otherwise": 0.5},
    "config.Profile.with_sae": lambda w: {"self": w.profile, "l1": 0.1, "steps": 7},
    "config.Profile.at_layer": lambda w: {"self": w.profile, "layer": 2},
    "config.Profile.sae_settings": lambda w: {"self": w.profile},
    "config.load_profile": lambda w: {"name_or_path": "mini"},
    "config.start": lambda w: {"name_or_path": "mini"},
    "config.device": lambda w: {},
    "data.images.content_id": lambda w: {"image": w.images[0]},
    "data.images.hash_of": lambda w: {"content": [1, "a"]},
    "data.images.rgb": lambda w: {"image": Image.fromarray(w.images[0])},
    "data.images.read_image": lambda w: {"source": w.folder / "images" / "cat" / "0.png", "name": "a picture"},
    "data.images.Crop.__call__": lambda w: {"self": w.clip.crop, "image": picture(3, (20, 31, 3))},
    "data.images.patch_shares": lambda w: {"plane": np.arange(64).reshape(8, 8) % 3 - 1, "n": 2, "grid": 4},
    "data.images.Images": lambda w: {"labels": [0, 1, 0], "class_names": ("cat", "dog")},
    "data.images.Images.uncropped": lambda w: {"self": w.ds},
    "data.images.Images.readable": lambda w: {"self": w.ds, "rows": [0, 5]},
    "data.images.Images.scene": lambda w: {"self": w.ds, "i": 3},
    "data.images.Images.fingerprint": lambda w: {"self": w.ds},
    "data.images.Images.identity": lambda w: {"self": w.ds},
    "data.images.FileDataset": lambda w: {"root": w.folder / "images", "files": [(w.folder / "images/cat/0.png", 0)],
                                          "class_names": ("cat",), "size": SIDE, "label_order": ()},
    "data.images.FileDataset.uncropped": lambda w: {"self": FolderDataset(w.folder / "images", size=SIDE)},
    "data.images.FileDataset.identity": lambda w: {"self": FolderDataset(w.folder / "images")},
    "data.images.HubDataset": lambda w: {"table": w.table(), "column": "image", "labels": np.arange(12) % 2,
                                         "class_names": ("cat", "dog"), "size": SIDE, "source": ()},
    "data.images.HubDataset.uncropped": lambda w: {"self": HubDataset(w.table(), "image", np.arange(12) % 2, NAMES, 8)},
    "data.images.HubDataset.identity": lambda w: {"self": HubDataset(w.table(), "image", np.arange(12) % 2, NAMES)},
    "data.images.images_in": lambda w: {"folder": w.folder / "images" / "cat"},
    "data.images.in_turn": lambda w: {"files": [("a", 0), ("b", 0), ("c", 1)], "n": 2},
    "data.datasets.ArrayDataset": lambda w: {"pixels": w.images, "labels": np.arange(12) % 3,
                                             "ids": [f"image {i}" for i in range(12)], "class_names": NAMES},
    "data.datasets.ArrayDataset.identity": lambda w: {"self": w.ds},
    "data.datasets.FolderDataset": lambda w: {"root": w.folder / "images", "n": 5, "size": SIDE},
    "data.datasets.subfolders": lambda w: {"root": w.folder / "images"},
    "data.datasets.class_files": lambda w: {"root": w.folder / "images"},
    "data.datasets.split_folders": lambda w: {"root": w.folder / "images"},
    "data.datasets.split_files": lambda w: {"root": w.folder / "images", "split": "train", "test_share": 0.3},
    "data.datasets.Subset": lambda w: {"ds": w.ds, "classes": [2, 0], "rows": [0, 2, 3]},
    "data.datasets.Subset.identity": lambda w: {"self": Subset(w.ds, [2, 0])},
    "data.datasets.open_dataset": lambda w: {"profile": w.profile, "task": "animals", "split": "test"},
    "data.datasets.images_folder": lambda w: {"profile": w.profile, "task": "animals"},
    "data.datasets.model_config": lambda w: {"name": str(w.folder / "clip"), "local": True},
    "data.datasets.images_there": lambda w: {"profile": w.profile, "task": "animals"},
    "data.datasets.images_lacking": lambda w: {"profile": w.profile, "task": "eurosat"},
    "data.datasets.templates": lambda w: {"profile": w.profile, "task": "animals"},
    "data.datasets.own_template": lambda w: {"profile": w.profile, "task": "animals"},
    "data.adapters.TorchImages": lambda w: {"ds": Pairs(w.images)},
    "data.adapters.TorchImages.identity": lambda w: {"self": TorchImages(Pairs(w.images))},
    "data.adapters.as_images": lambda w: {"source": (w.images, np.arange(12) % 3)},
    "weights.formats.read_sae": lambda w: {"path": w.folder / "sae", "device": "cpu"},
    "weights.formats.sae_hash": lambda w: {"tensors": w.sae().state_dict(), "activation": "topk", "k": 3},
    "weights.formats.write_folder": lambda w: {"folder": w.folder / "new" / "sae", "tensors": w.sae().state_dict(),
                                               "activation": "topk", "k": 3},
    "weights.formats.write_official": lambda w: {"path": w.folder / "new" / "sae.pt", "sae": w.sae()},
    "weights.formats.write_saelens": lambda w: {"folder": w.folder / "new" / "lens", "sae": w.sae(),
                                                "model_name": "clip", "hook_name": "block 10"},
    "weights.formats.checked_k": lambda w: {"activation": "topk", "k": 3, "n_latents": 9},
    "studies.study.Study": lambda w: {"profile": w.profile},
    "studies.study.Study.committed_log": lambda w: {"self": w.study()},
    "studies.study.Study.training": lambda w: {"self": w.study()},
    "studies.study.Study.untrained": lambda w: {"self": w.study()},
    "studies.study.Study.check": lambda w: {"self": w.study(), "name": "gain", "value": 0.5},
    "studies.study.Study.need": lambda w: {"self": w.study(), "there": True, "sentence": "There is nothing here."},
    "studies.study.Study.images": lambda w: {"self": w.study(), "task": "animals", "split": "test"},
    "studies.study.Study.statistics": lambda w: {"self": w.study(), "sae": w.sae(), "ds": w.ds, "layer": 1,
                                                 "tokens": "cls"},
    "studies.study.Study.answers": lambda w: {"self": w.study(), "questions": _questions(w), "ds": w.ds},
    "studies.study.Study.saes": lambda w: {"self": w.study(), "profiles": [w.profile]},
    "studies.study.Study.variant": lambda w: {"self": w.study(), "profile": w.profile},
    "studies.study.Study.next_seed": lambda w: {"self": w.study()},
    "studies.study.open_study": lambda w: {"profile": w.profile},
    "studies.study.fingerprint": lambda w: {"model": w.sae()},
    "studies.study.run_folder": lambda w: {"profile": w.profile, "clip": w.clip},
    "studies.study.committed_folder": lambda w: {"profile": w.profile, "clip": w.clip},
    "studies.study.committed_log": lambda w: {"profile": w.profile, "clip": w.clip},
    "studies.study.trained_sae": lambda w: {"profile": w.profile, "clip": w.clip, "ds": w.ds},
    "studies.study.trained_saes": lambda w: {"profiles": [w.profile], "clip": w.clip, "ds": w.ds},
    "studies.study.train_missing": lambda w: {"profiles": [w.profile], "clip": w.clip, "ds": w.ds},
    "studies.study.compared": lambda w: {"profile": w.profile},
    "studies.study.next_seed": lambda w: {"profile": w.profile},
    "studies.study.has_masks": lambda w: {"profile": w.profile},
    "studies.study.passes": lambda w: {"profiles": [w.profile], "width": 12, "device": "cpu"},
    "studies.study.training_bytes": lambda w: {"profile": w.profile, "width": 12},
    "studies.study.given_sae": lambda w: {"profile": w.profile.with_sae(weights=str(w.folder / "sae")),
                                          "clip": w.clip},
}


def _questions(w: World) -> list[Question]:
    return [Question(w.clip, w.sae(), LAYER), Question(w.clip, w.sae(), 0, "cls")]


def _cache(w: World):
    from patchsae import open_cache

    return open_cache(w.folder / "cache")


def _setup(w: World) -> Setup:
    return Setup(w.clip, w.sae(), w.text, LAYER, [make_arm(w.lat, "class", 0, [1, 4])], 2, [0, 1, 2], False)
