"""MaPLe's files: our own, of prompts alone, and official checkpoints, which hold the CLIP they belong to as well."""

from collections.abc import Sequence
from pathlib import Path

import torch

from patchsae.clip import Clip
from patchsae.maple import TEMPLATE, WORDS, MaPLe, Prompts, class_tokens, empty_prompts, template_of
from patchsae.weights.clips import openai_clip, renamed
from patchsae.weights.files import checked_weights, load_json, load_tensors
from patchsae.weights.foreign import read_state_dict

#: Part of a checkpoint -> what stands before the names of its tensors in OpenAI's layout; the prompts are in none.
TOWERS = {"image_encoder": "visual.", "text_encoder": "", "prompt_learner": None}


def read_prompts(folder: Path, clip: Clip) -> tuple[Prompts, str]:
    """What ``MaPLe.save`` wrote: prompts for a CLIP of the same widths, and how classes are called."""
    settings = load_json(folder / "prompts.json", "n", "depth", "vision")
    template = settings.pop("template", template_of(settings["n"]))
    prompts = empty_prompts(clip, **settings)
    _fill(prompts, load_tensors(folder / "prompts.safetensors"), str(folder))
    return prompts, template


def _fill(prompts: Prompts, tensors: dict[str, torch.Tensor], where: str) -> None:
    """Give prompts their values; every name must have a place and every place a name."""
    shapes = {name: list(p.shape) for name, p in prompts.state_dict().items()}
    if wrong := shapes.keys() ^ tensors.keys():
        name = min(wrong, key=lambda name: (name in tensors, name))
        raise ValueError(f"{where} has {'no place for' if name in tensors else 'no'} prompt weight {name}; use a "
                         "checkpoint of this depth.")
    prompts.load_state_dict(checked_weights(tensors, shapes, where))


def read_official(checkpoint: str | Path | dict, token_embedding, token_ids: torch.Tensor | None,
                  class_names: Sequence[str] | None, clip: Clip | None, depth: int | None) -> MaPLe:
    """The adapted model of a checkpoint; arguments as of ``MaPLe.from_official``."""
    given = isinstance(checkpoint, dict)
    learned, frozen = _split(checkpoint.get("state_dict", checkpoint) if given else read_state_dict(Path(checkpoint)))
    # Embedded class names that it was trained with; what precedes the prompts is the start token alone.
    suffix, _ = learned.pop("token_suffix", None), learned.pop("token_prefix", None)
    its_depth = 1 + sum(name.startswith("compound_prompts_text.") for name in learned)
    if depth not in (None, its_depth):
        key = f"prompt_learner.compound_prompts_text.{min(its_depth, depth) - 1}"
        raise ValueError(f"The checkpoint has prompts of depth {its_depth}, not {depth}, by its key {key}: one of the "
                         "two has it; load the one trained with this depth.")
    if clip is None:
        clip = _clip_inside(frozen, token_embedding)
    else:
        _refuse_another(clip, frozen)
    prompts = empty_prompts(clip, len(learned["ctx"]), its_depth, vision=True)
    _fill(prompts, learned, "The checkpoint")
    if token_ids is not None:
        return MaPLe(clip, prompts, torch.as_tensor(token_ids))
    if class_names is None or clip.tokenizer is None:
        raise ValueError("There are no classes to name; give token_ids, or class_names and a clip that has a "
                         "tokenizer.")
    template = _trained_template(clip, prompts.n, suffix)
    return MaPLe(clip, prompts, class_tokens(clip, class_names, template), template)


def _split(state: dict) -> tuple[dict, dict]:
    """Prompts, and CLIP under OpenAI's names."""
    learned, frozen = {}, {}
    for key, value in state.items():
        tower, _, name = str(key).partition(".")
        if not torch.is_tensor(value) or tower not in TOWERS and key != "logit_scale":
            raise ValueError(f"The checkpoint's key {key!r:.80} does not belong to MaPLe; give its model.pth.tar-N.")
        if "VPT" in name:
            raise ValueError(f"The checkpoint is of IVLP, by its key {key}: its image prompts do not follow from its "
                             "text prompts, so that it cannot be read; give a checkpoint of MaPLe.")
        if tower == "prompt_learner":
            learned[name] = value
        else:
            frozen[TOWERS[tower] + name if tower in TOWERS else key] = value
    if "ctx" not in learned or learned["ctx"].ndim != 2:
        raise ValueError("The checkpoint lacks the key prompt_learner.ctx; give MaPLe's model.pth.tar-N.")
    return learned, frozen


def _clip_inside(frozen: dict, token_embedding) -> Clip:
    """The CLIP inside a checkpoint, with the token embedding it does not hold."""
    if token_embedding is None:
        raise ValueError("MaPLe's checkpoint has no token embedding; give CLIP's as token_embedding, or a whole clip.")
    table = torch.as_tensor(getattr(token_embedding, "weight", token_embedding))
    return Clip(openai_clip(frozen | {"token_embedding.weight": table}, "The checkpoint"))


def _refuse_another(clip: Clip, frozen: dict) -> None:
    """Refuse a CLIP that the checkpoint was not trained on."""
    weights = clip.model.state_dict()
    for name, value in renamed(frozen, "The checkpoint").items():
        if name not in weights or not _alike(weights[name], value):
            raise ValueError(f"The checkpoint was trained on another CLIP, its weight {name} differs; load that CLIP.")


def _trained_template(clip: Clip, n: int, suffix: torch.Tensor | None) -> str:
    """How classes were called in training with n learned tokens, told by what follows those: ``suffix [C,L,D_text]``.

    The published code replaces the first n words of its template, which leaves the others in front of every name; with
    ``CTX_INIT=""`` names follow at once.
    """
    if n >= WORDS:  # no word is left in either case
        return template_of(n)
    left = class_tokens(clip, ["x"])[0, 1 + n:1 + WORDS]
    left = clip.model.text_model.embeddings.token_embedding(left)
    if not torch.is_tensor(suffix) or suffix.ndim != 3 or not len(suffix) or suffix[0, :len(left)].shape != left.shape:
        raise ValueError("The checkpoint has no prompt_learner.token_suffix to tell which words it was trained with; "
                         "give token_ids.")
    start = suffix[:, :len(left)]
    if _alike(start, left.expand_as(start)):
        return TEMPLATE
    if _alike(start[:, 0], start[:1, 0].expand_as(start[:, 0])):
        raise ValueError(f"The checkpoint was trained with other words than those of {TEMPLATE!r}; give token_ids of "
                         "prompts with its CTX_INIT.")
    return "X " * n + "{}."


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether tensors are equal but for half precision."""
    return a.shape == b.shape and torch.allclose(a.cpu().float(), b.cpu().float(), rtol=2**-10, atol=1e-6)
