"""What is chosen in the explorer, as a link can hold it, and pictures that a user gives."""

import io
from dataclasses import asdict, dataclass, fields
from urllib.parse import parse_qsl, urlencode

import numpy as np
from PIL import Image

from patchsae.data.images import rgb

#: The data set that holds nothing but the picture a user gave.
UPLOAD = "your picture"
#: What an uploaded picture may have at most: bytes, pixels, pixels a side. All are checked before a pixel is decoded.
MAX_BYTES, MAX_PIXELS, MAX_SIDE = 8 * 2**20, 24_000_000, 20_000
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
#: Which latents are listed, in the order of the explorer's choices.
SCOPES = {"patch": "selected patches", "image": "whole image", "class": "a class", "words": "words",
          "similar": "similar ones", "scatter": "the scatter", "changed": "changed by adaptation"}
#: How many latents a list has; cells of the scatter, down and across, in which places are counted.
LISTED, CELLS = 12, (40, 60)


@dataclass(frozen=True)
class State:
    """What the explorer shows, and all a link to it holds.

    ``region``: patches from (top, left) to (bottom, right), ends included; ``label``: class whose latents are listed;
    ``anchor``: latent that others are compared with; ``box``: cells of the scatter, as ``region``;
    ``factors``: (latent, factor) pairs that scale latents, 0 switching one off; ``threshold``: share of a latent's
    highest patch below which its mask is black.
    """

    dataset: str = ""
    image: int = 0
    region: tuple[int, ...] = (0, 0, 0, 0)
    scope: str = "patch"
    label: int = 0
    query: str = ""
    anchor: int = 0
    box: tuple[int, ...] = (0, 0, 0, 0)
    latent: int = 0
    factors: tuple[tuple[int, float], ...] = ()
    mask: bool = False
    threshold: float = 0.0

    def link(self) -> str:
        """The state as the query of an address: ``image=8&region=3_4_3_4&factors=412x0``."""
        values = {k: v for k, v in asdict(self).items() if v != getattr(State, k)}
        values |= {k: "_".join(map(str, v)) for k, v in values.items() if k in ("region", "box")}
        if self.factors:
            values["factors"] = "_".join(f"{latent}x{factor:g}" for latent, factor in self.factors)
        return urlencode(values | ({"mask": 1} if self.mask else {}), safe="/,")

    @classmethod
    def from_link(cls, link: str) -> "State":
        """Read what ``link`` wrote; other keys are left to others."""
        known = {f.name: f for f in fields(cls)}
        given = {k: v for k, v in parse_qsl(link.rpartition("?")[2]) if k in known}
        try:
            return cls(**{k: _read(k, known[k].default, v) for k, v in given.items()})
        except ValueError:
            raise ValueError(f"The link {link[:80]!r} cannot be read; copy all of it again.") from None


def _read(name: str, default, text: str):
    """One value of a link, of the type of its default."""
    if name == "factors":
        return tuple((int(s), float(f)) for s, f in (pair.split("x") for pair in text.split("_")))
    if isinstance(default, tuple):
        return tuple(map(int, text.split("_")))
    return text == "1" if isinstance(default, bool) else type(default)(text)


def decode_picture(data: bytes) -> np.ndarray:
    """A picture that a user gave, uint8 ``[H,W,3]``, upright; size and format are checked before it is decoded."""
    if len(data) > MAX_BYTES:
        raise ValueError(f"The picture has {len(data) / 2**20:.1f} MB, the limit is {MAX_BYTES // 2**20} MB; "
                         "choose a smaller file.")
    limit = Image.MAX_IMAGE_PIXELS
    try:
        Image.MAX_IMAGE_PIXELS = None  # ours is lower, and says what to do
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception:
        raise ValueError(f"The file is not a picture that can be read; choose one of {', '.join(FORMATS)}.") from None
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    width, height = image.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise ValueError(f"The picture has {width:,} x {height:,} pixels, the limit is {MAX_PIXELS // 10**6} "
                         f"megapixels and {MAX_SIDE:,} pixels a side; choose a smaller one.")
    try:
        return rgb(image)
    except Exception:  # a hostile file can make a decoder fail in any way
        raise ValueError("The picture is damaged and cannot be decoded; choose another file.") from None
