"""What the explorer and the dashboard have in common on a page: the style, pictures as addresses, latents in words."""

import base64
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from patchsae.figures import canvas
from patchsae.latents import LatentStatistics

COLOURS = ("BLUE", "ORANGE", "GREEN", "RED", "PURPLE", "INK")


def style() -> str:
    """``pages.css`` with the colours of the figures."""
    colours = "; ".join(f"--{name.lower()}: {getattr(canvas, name)}" for name in COLOURS)
    return f".px {{ {colours}; }}\n" + Path(__file__).with_name("pages.css").read_text(encoding="utf-8")


def jpeg(image: np.ndarray, quality: int = 92) -> bytes:
    """An image ``[H,W,3]`` uint8 as a JPEG file with colours as fine as its outlines."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def address(data: bytes, kind: str = "image/jpeg") -> str:
    """A file as an address that holds all of it."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def facts(stats: LatentStatistics, latent: int) -> list[tuple[str, str]]:
    """The statistics of a latent in words."""
    def number(value: torch.Tensor, form: str) -> str:
        return "not defined" if value.isnan() else form.format(float(value))

    return [("active on images", number(stats.frequency[latent], "{:.1%}")),
            ("mean activation", number(stats.mean_activation[latent], "{:.3f}")),
            ("label entropy", number(stats.label_entropy[latent], "{:.2f} nats")),
            ("deviation of labels", number(stats.label_std[latent], "{:.1f}"))]
