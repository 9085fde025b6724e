"""Imported once, by the process that kernels are forked from: what every visitor reads is loaded here."""

import gc
import sys

import ipykernel.kernelapp  # noqa: F401
import ipywidgets  # noqa: F401
import torch

from patchsae.app.explorer import Explorer
from patchsae.app.widget import ExplorerWidget
from patchsae.config import load_profile
from patchsae.studies.study import Study

torch.set_num_threads(1)
sys.modules["debugpy"] = None  # a kernel would load it, and a visitor needs no debugger
EXPLORER = Explorer(Study(load_profile()))
EXPLORER.warm()
ExplorerWidget(EXPLORER).close()  # what a visitor sees first is kept
# Collecting garbage would write to every page of memory, and so make it each visitor's own.
gc.collect()
gc.freeze()
