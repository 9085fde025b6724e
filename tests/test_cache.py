"""The disk cache of activations: the tokens themselves, whatever happened while they were written, or an error."""

import errno
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LAYER, SIDE, one_sentence, random_clip_model, tiny_processor

from patchsae import ArrayDataset, cache
from patchsae.cache import cache_bytes, cache_folder, free_bytes, open_cache, write_cache
from patchsae.clip import Clip
from patchsae.datasets import Subset
from patchsae.shards import load_sealed, save_sealed

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

from stress_cache import FAULTS, inject, interrupted, served_wrongly  # noqa: E402
