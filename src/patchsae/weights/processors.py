"""What lies beside the weights of a CLIP: its tokenizer and its image processor."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from patchsae.weights.files import first_line


def read_tokenizer(path: Path, n_words: int):
    """The tokenizer in the folder of a CLIP that knows so many words, or beside its file; None where there is none."""
    def load(folder: str):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer(["a photo of a cat."])
        return tokenizer

    tokenizer = _beside(path if path.is_dir() else path.parent, "tokenizer_config.json", load)
    if tokenizer is not None and len(tokenizer) > n_words:
        raise ValueError(f"The tokenizer of {path} has {len(tokenizer):,} tokens, but its CLIP knows {n_words:,}; "
                         "fetch both again.")
    return tokenizer


def read_processor(path: Path, size: int) -> CLIPImageProcessorPil | None:
    """The image processor in a CLIP's folder, or None; of a CLIP in one file, CLIP's own for images of that size."""
    def load(folder: str):
        processor = CLIPImageProcessorPil.from_pretrained(folder)
        grey_levels(processor)
        return processor

    if path.is_file():
        return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    return _beside(path, "preprocessor_config.json", load)


def _beside(folder: Path, name: str, load: Callable):
    """What is loaded from a folder that has a file of this name, else None."""
    if not (folder / name).is_file():
        return None
    try:
        return load(str(folder))
    except Exception as error:  # each library fails in its own ways
        raise ValueError(f"{folder / name} or a file that goes with it is damaged ({first_line(error)}); fetch it "
                         "again.") from error


def grey_levels(processor, size: int | None = None) -> torch.Tensor:
    """What a processor makes of the 256 grey levels of each channel, which are finite and rise: ``[3,256]``.

    ``size``: one that asks for other crops than CLIP's of so many pixels is refused.
    """
    crops = [dict(processor.size).get("shortest_edge"), *dict(processor.crop_size).values(), processor.resample]
    if size is not None and crops != [size, size, size, Image.Resampling.BICUBIC]:
        raise ValueError(f"preprocessor_config.json asks for other crops than CLIP's of {size} pixels, bicubic; mend "
                         "it.")
    levels = Image.fromarray(np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2))
    pixels = processor(images=[levels], do_resize=False, do_center_crop=False, return_tensors="pt")["pixel_values"]
    if not pixels.isfinite().all() or not (pixels.diff(dim=-1) > 0).all():
        raise ValueError("The processor's mean, deviation or factor makes no pixels of grey levels; mend "
                         "preprocessor_config.json.")
    return pixels[0, :, 0]
