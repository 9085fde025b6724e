"""One training step (sec. 3.1, A.1): losses and gradients the cheaper way, the update, and all that a later step needs.

Nothing in a step waits for a GPU. Every ``look_every`` steps there is a look at the numbers on the device: whether the
loss is finite, which latents can be dead before the next look, and whether few enough latents are active that the
sparse way is faster.
"""

from pathlib import Path
from typing import NamedTuple

import torch

from patchsae.fast import processes
from patchsae.fast.sparse import sparse_step
from patchsae.sae import SparseAutoencoder
from patchsae.weights.files import load_tensors, save_tensors, tensor_hash

#: From this many weights in W_dec on, steps may be sparse and Adam is fused; both round otherwise than the plain forms,
#: which narrow autoencoders keep.
WIDE = 2**22
#: Share of active latents below which the sparse step is the faster one; on a GPU by arithmetic (docs/performance.md).
SPARSE_BELOW = {"cpu": 1 / 32, "cuda": 1 / 128}
#: Steps between looks. On the CPU there is nothing to wait for.
LOOK_EVERY = {"cpu": 1, "cuda": 32}


class Step(NamedTuple):
    """Scalars of a step, on the device: ``mse``, ``l1`` (weighted), ``ghost``, ``total``; ``l0``: active latents per
    token; ``dead``: share of the latents, after the step; ``ev``: explained variance of the batch."""

    mse: torch.Tensor
    l1: torch.Tensor
    ghost: torch.Tensor
    total: torch.Tensor
    l0: torch.Tensor
    dead: torch.Tensor
    ev: torch.Tensor


class TooManyActive(RuntimeError):
    """More latents were active than there was room for, so that the steps since the last checkpoint do not count."""


class Training:
    """An autoencoder with its optimiser and its dead-latent counters: what a step reads and changes.

    ``quiet [S]``: for each latent, how many steps in a row it has fired on no token. ``candidates [K]``: the latents
    that can be dead before the next look. ``capacity``: how many active latents a sparse step has room for, ``room``
    times as many as were seen; 0 while steps are dense.
    """

    def __init__(self, sae: SparseAutoencoder, lr: float = 4e-4, l1: float = 8e-5, warmup: int = 500,
                 dead_after: int = 64, ghost: bool = True, precision: str = "float32", room: int = 3):
        self.sae, self.lr, self.l1, self.warmup, self.room = sae, lr, l1, warmup, room
        self.dead_after, self.ghost, self.bf16, self.steps_done = dead_after, ghost, precision == "bf16", 0
        sharded, device = processes.shard(sae, "losses"), sae.W_enc.device
        wide = sae.d_model * sae.n_latents >= WIDE and not sharded
        self.look_every = min(LOOK_EVERY[device.type], 1 + dead_after // 2)
        self.sparse_below = SPARSE_BELOW[device.type] if wide and sae.activation in ("relu", "topk") else 0
        self.optimizer = torch.optim.Adam(sae.parameters(), lr=lr, fused=wide or None)
        if wide:  # a latent's weights side by side, as sums over latents want them
            sae.W_enc.data = sae.W_enc.data.T.contiguous().T
        self.quiet = torch.zeros(sae.n_latents, dtype=torch.long, device=device)
        self.candidates, self.capacity, self.most = self.quiet[:0], 0, torch.zeros((), dtype=torch.long, device=device)

    @property
    def dead(self) -> torch.Tensor:
        """Latents that have not fired for more than ``dead_after`` steps: bool ``[S]``."""
        return self.quiet > self.dead_after

    @property
    def looked(self) -> bool:
        """Whether the last step ended with a look."""
        return self.steps_done % self.look_every == 0

    def step(self, z: torch.Tensor) -> Step:
        """One step on tokens ``[...,D]``; with several processes, each on tokens of its own."""
        self.sae.normalise_decoder()
        losses, z_hat, n_active, fired = (self._sparse if self.capacity else self._dense)(z)
        if self.look_every == 1:
            self._refuse(losses[3])
        processes.average([*(p.grad for p in self.sae.parameters()), *self.sae.buffers()])
        self.sae.remove_parallel_gradient()
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * min(1.0, (self.steps_done + 1) / max(1, self.warmup))
        self.optimizer.step()
        self.quiet = torch.where(processes.anywhere(fired), 0, self.quiet + 1)
        self.steps_done, self.most = self.steps_done + 1, torch.maximum(self.most, n_active)
        tokens = z.flatten(0, -2)
        self.last = torch.stack([*losses, n_active / len(tokens), self.dead.float().mean(), _explained(tokens, z_hat)])
        processes.average([self.last])
        if self.looked:
            self.look()
        return Step(*self.last)

    def _dense(self, z: torch.Tensor) -> tuple:
        with torch.autocast(z.device.type, torch.bfloat16, enabled=self.bf16):
            losses = self.sae.losses(z, self.l1, *((self.dead, self.candidates) if self.ghost else ()))
        self.optimizer.zero_grad()
        losses.total.backward()
        self.sae.update_threshold(losses.h.detach())
        active = (losses.h.detach() > 0).flatten(0, -2)
        return [x.detach() for x in losses[:4]], losses.z_hat.detach().flatten(0, -2), active.sum(), active.any(0)

    def _sparse(self, z: torch.Tensor) -> tuple:
        candidates = self.candidates if self.ghost else self.candidates[:0]
        done = sparse_step(self.sae, z.flatten(0, -2), self.l1, self.dead, candidates, self.capacity, self.bf16)
        return done[:4], done.z_hat, done.n_active, done.fired

    def look(self) -> None:
        """Read what the device has, and set what the steps until the next look go by."""
        self._refuse(self.last[3])
        active = processes.most(self.most)
        if self.capacity and self.quiet.is_cuda and active > self.capacity:
            raise TooManyActive
        share = self.last[4].item() / self.sae.n_latents
        self.capacity = self.room * active if share < self.sparse_below else 0
        self.candidates = (self.quiet > self.dead_after + 1 - self.look_every).nonzero()[:, 0]
        self.most = torch.zeros_like(self.most)

    def _refuse(self, total: torch.Tensor) -> None:
        """Stop at a loss that is not a number; on the CPU before it reaches the weights."""
        if not total.isfinite():
            raise ValueError(f"The loss of step {self.steps_done} is {total.item()}: the tokens hold NaN or "
                             "infinity, or the learning rate is too high; check the images and the profile.")

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything a later step depends on, by name."""
        state = {f"sae.{name}": value for name, value in self.sae.state_dict().items()} | {"quiet": self.quiet}
        state |= {"candidates": self.candidates, "counts": torch.tensor([self.steps_done, self.capacity])}
        names = [name for name, _ in self.sae.named_parameters()]
        for i, moments in self.optimizer.state_dict()["state"].items():
            state |= {f"adam.{names[i]}.{key}": torch.as_tensor(value) for key, value in moments.items()}
        return {name: processes.whole(tensor) for name, tensor in state.items()}

    def trained(self) -> SparseAutoencoder:
        """The autoencoder as it is now, in one piece and with decoder rows of unit length."""
        old = self.sae
        first = torch.Generator()  # of its own, so that the global one is left alone
        sae = SparseAutoencoder(old.d_model, old.n_latents, first, old.activation, old.k).to(self.quiet.device)
        sae.load_state_dict({name: processes.whole(value) for name, value in old.state_dict().items()})
        sae.normalise_decoder()
        return sae

    def save(self, folder: Path) -> None:
        """Write a checkpoint: one file of tensors and their hash, so that it is there whole or not at all."""
        tensors = self.tensors()
        if processes.rank() == 0:
            save_tensors(Path(folder) / "checkpoint.safetensors", tensors | {"hash": _hash(tensors)})

    def resume(self, folder: Path) -> None:
        """Continue from a checkpoint."""
        path = Path(folder) / "checkpoint.safetensors"
        tensors = load_tensors(path, str(self.quiet.device))
        needed = {"quiet", "candidates", "counts", "hash", *(f"sae.{name}" for name in self.sae.state_dict())}
        if missing := sorted(needed - set(tensors)):
            raise ValueError(f"{path} lacks {missing[0]}; remove the folder and train again.")
        if not torch.equal(tensors.pop("hash").cpu(), _hash(tensors)):
            raise ValueError(f"{path} is damaged, its hash is another one; remove the folder and train again.")
        own = self.sae.state_dict()
        self.sae.load_state_dict({name: processes.placed(tensors[f"sae.{name}"], own[name]) for name in own})
        self.quiet, self.candidates = tensors["quiet"], tensors["candidates"]
        self.steps_done, self.capacity = tensors["counts"].tolist()
        state = self.optimizer.state_dict()
        for i, (name, p) in enumerate(self.sae.named_parameters()):
            prefix = f"adam.{name}."
            moments = {k[len(prefix):]: v for k, v in tensors.items() if k.startswith(prefix)}
            # In the parameter's own layout, which the fused optimiser asks for.
            state["state"][i] = {k: v.cpu() if k == "step" else torch.empty_like(p).copy_(processes.placed(v, p))
                                 for k, v in moments.items()}
        self.optimizer.load_state_dict(state)


def _hash(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Hash of tensors, as a tensor: uint8 ``[8]``."""
    return torch.tensor(list(bytes.fromhex(tensor_hash(tensors))), dtype=torch.uint8)


def _explained(z: torch.Tensor, z_hat: torch.Tensor) -> torch.Tensor:
    """Explained variance of a batch of tokens ``[N,D]``, centred on its mean."""
    return 1 - (z_hat - z).square().sum() / (z - z.mean(0)).square().sum()
