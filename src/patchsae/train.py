"""Training an autoencoder (sec. 3.1, A.1): the step, and runs that keep a log and go on to the same bytes.

Nothing in a step waits for a GPU. Every ``look_every`` steps there is a look at the numbers on the device: whether the
loss is finite, which latents can be dead before the next look, and whether few enough latents are active that the
sparse way is faster.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from patchsae.cache import profile_cache
from patchsae.clip import Clip
from patchsae.config import Profile
from patchsae.data.checks import Natural, NotNegative, Rate, Tokens, Whole, guard
from patchsae.data.images import Images
from patchsae.fast import processes
from patchsae.fast.medians import initial_b_dec
from patchsae.fast.pools import TrainingTokens, ahead, shuffled_tokens, training_rows
from patchsae.fast.sparse import sparse_step
from patchsae.sae import SparseAutoencoder
from patchsae.weights.files import load_json, load_tensors, save_json, save_tensors, tensor_hash, write_atomically

#: From this many weights in W_dec on, steps may be sparse and Adam is fused; both round otherwise than the plain forms,
#: which narrow autoencoders keep.
WIDE = 2**22
#: Share of active latents below which the sparse step is the faster one; on a GPU by arithmetic (docs/performance.md).
SPARSE_BELOW = {"cpu": 1 / 32, "cuda": 1 / 128}
#: Steps between looks. On the CPU there is nothing to wait for.
LOOK_EVERY = {"cpu": 1, "cuda": 32}
#: How many times the active latents of the steps before a sparse step has room for.
ROOM = 3
#: Images that b_dec starts from, in batches of training.
FIRST_BATCHES = 8


# The step -----------------------------------------------------------------------------------------------

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


LOG_COLUMNS = ["step", *Step._fields]


class TooManyActive(RuntimeError):
    """More latents were active than there was room for, so that the steps since the last checkpoint do not count."""


class Training:
    """An autoencoder with its optimiser and its dead-latent counters: what a step reads and changes.

    ``quiet [S]``: for each latent, how many steps in a row it has fired on no token. ``candidates [K]``: the latents
    that can be dead before the next look. ``capacity``: how many active latents a sparse step has room for, ``room``
    times as many as were seen; 0 while steps are dense.
    """

    def __init__(self, sae: SparseAutoencoder, lr: Rate = 4e-4, l1: NotNegative = 8e-5, warmup: Whole = 500,
                 dead_after: Whole = 64, ghost: bool = True, precision: Literal["float32", "bf16"] = "float32"):
        self.sae, self.lr, self.l1, self.warmup, self.room = sae, lr, l1, warmup, ROOM
        self.dead_after, self.ghost, self.bf16, self.steps_done = dead_after, ghost, precision == "bf16", 0
        sharded, device = processes.shard(sae, "losses"), sae.W_enc.device
        wide = sae.d_model * sae.n_latents >= WIDE and not sharded
        self.look_every = min(LOOK_EVERY[device.type], 1 + dead_after // 2)
        self.sparse_below = SPARSE_BELOW[device.type] if wide and sae.steps_sparsely else 0
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

    def step(self, z: Tokens) -> Step:
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
        self.optimizer.zero_grad()  # gradients of one of several autoencoders at a time are in memory
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
        self.sae.after_step(losses.h.detach())
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

    def make_room(self, times: Natural) -> None:
        """Have so many times the room for active latents, from the next step on."""
        self.room, self.capacity = times * self.room, times * self.capacity

    def _refuse(self, total: torch.Tensor) -> None:
        """Stop at a loss that is not a number; on the CPU before it reaches the weights."""
        if not total.isfinite():
            raise ValueError(f"The loss of step {self.steps_done} is {total.item()}: the tokens hold NaN or "
                             "infinity, or the learning rate is too high; check the images and the profile.")

    def trained(self) -> SparseAutoencoder:
        """The autoencoder as it is now, in one piece and with decoder rows of unit length."""
        old = self.sae
        first = torch.Generator()  # of its own, so that the global one is left alone
        sae = SparseAutoencoder(old.d_model, old.n_latents, first, old.activation, old.k).to(self.quiet.device)
        sae.load_state_dict({name: processes.whole(value) for name, value in old.state_dict().items()})
        sae.normalise_decoder()
        return sae

    # Checkpoints ----------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything a later step depends on, by name."""
        state = {f"sae.{name}": value for name, value in self.sae.state_dict().items()} | {"quiet": self.quiet}
        state |= {"candidates": self.candidates, "counts": torch.tensor([self.steps_done, self.capacity])}
        names = [name for name, _ in self.sae.named_parameters()]
        for i, moments in self.optimizer.state_dict()["state"].items():
            state |= {f"adam.{names[i]}.{key}": torch.as_tensor(value) for key, value in moments.items()}
        return {name: processes.whole(tensor) for name, tensor in state.items()}

    def save(self, folder: Path) -> None:
        """Write a checkpoint: one file of tensors and their hash, so that it is there whole or not at all."""
        tensors = self.tensors()
        if processes.rank() == 0:
            save_tensors(Path(folder) / "checkpoint.safetensors", tensors | {"hash": _hash(tensors)})

    def resume(self, folder: Path) -> None:
        """Continue from a checkpoint."""
        path = Path(folder) / "checkpoint.safetensors"
        tensors = load_tensors(path, str(self.quiet.device))
        stated = tensors.pop("hash", torch.zeros(0, dtype=torch.uint8))
        if not torch.equal(stated.cpu(), _hash(tensors)):
            raise ValueError(f"{path} is damaged, its hash is another one; remove the folder and train again.")
        weights = self.sae.state_dict()
        self.sae.load_state_dict({name: processes.placed(tensors[f"sae.{name}"], weights[name]) for name in weights})
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


def train_steps(sae: SparseAutoencoder, batches: Iterable[torch.Tensor], lr: Rate = 4e-4, l1: NotNegative = 8e-5,
                warmup: Whole = 500, dead_after: Whole = 64, ghost: bool = True) -> torch.Tensor:
    """Train in place on an iterable of tokens ``[...,D]``; returns ``[steps,4]`` = mse, l1, ghost, total."""
    training = Training(sae, lr, l1, warmup, dead_after, ghost)
    history = [torch.stack(training.step(z)[:4]).detach() for z in batches]
    if not history:
        raise ValueError("There are no batches to train on; give at least one.")
    return torch.stack(history)


# The run ------------------------------------------------------------------------------------------------

#: The tokens of a model and data set at some layers; the last ones asked for are kept.
_tokens = functools.lru_cache(maxsize=1)(TrainingTokens)


def training_batches(profiles: Sequence[Profile], clip: Clip, ds: Images, steps: range) -> Iterator[list[torch.Tensor]]:
    """For each step the tokens that each of some profiles trains on: whole images ``[B,T,D]`` or shuffled tokens
    ``[B*T,D]``, of all tokens or of the class tokens alone (T = 1). Images are read once for all profiles, which must
    take them in one order (see ``rides``). Of several processes each has its share of every batch."""
    if len(set(map(rides, profiles))) != 1:
        raise ValueError("These profiles do not read the same images in the same order, so that they cannot train in "
                         "one pass; give each group of equal `rides` to a call of its own.")
    first, at = profiles[0], {clip.block(profile.model.layer): profile for profile in profiles}
    s, caches = first.sae, [profile_cache(profile, clip, ds) for profile in at.values()] if first.data.cache else []
    tokens = _tokens(clip, ds, tuple(at), s.precision == "bf16", tuple(caches))
    if s.batch_images % processes.count():
        raise ValueError(f"A batch of {s.batch_images} images cannot be shared evenly by {processes.count()} "
                         "processes; change sae.batch_images or the number of processes.")
    if s.shuffle == "tokens":
        batches = shuffled_tokens(tokens, steps, s.batch_images // processes.count(), first.order, s.tokens == "cls")
    else:
        mine = np.array(processes.share(s.batch_images))
        batches = tokens.batches(training_rows(len(ds), step, s.batch_images, first.order)[mine] for step in steps)
    place = [list(at).index(clip.block(profile.model.layer)) for profile in profiles]
    cut = [p.sae.tokens == "cls" and p.sae.shuffle == "images" for p in profiles]
    for found in ahead(batches, clip.device):
        yield [found[i][:, :1] if cls else found[i] for i, cls in zip(place, cut)]


def rides(profile: Profile) -> tuple:
    """What profiles have in common whose autoencoders can train in one pass over the images of a model: which images,
    in which order, how many at a time, and how tokens of them are had. Their layers may differ."""
    s, data = profile.sae, profile.data
    return (profile.order, s.batch_images, s.shuffle, s.precision, s.tokens if s.shuffle == "tokens" else "",
            data.source, data.task, data.train_images, data.cache)


def new_saes(profiles: Sequence[Profile], clip: Clip, ds: Images) -> list[SparseAutoencoder]:
    """Untrained autoencoders of the profiles' widths, b_dec set from the first batches of whole images."""
    whole = [dataclasses.replace(p, sae=dataclasses.replace(p.sae, shuffle="images")) for p in profiles]
    batches, saes = list(training_batches(whole, clip, ds, range(FIRST_BATCHES))), []
    for profile, own in zip(profiles, zip(*batches)):
        sae, z = _empty(profile, clip), torch.cat(processes.gathered(torch.cat(own)))
        sae.b_dec.data = initial_b_dec(z, profile.sae.b_dec)
        saes.append(sae.to(clip.device))
    return saes


def _empty(profile: Profile, clip: Clip) -> SparseAutoencoder:
    """An autoencoder of the profile's shape with its first weights, b_dec aside."""
    generator = torch.Generator().manual_seed(profile.seed)
    s = profile.sae
    return SparseAutoencoder(clip.width, round(s.expansion * clip.width), generator, s.activation, s.k)


def run_key(profile: Profile, clip: Clip) -> str:
    """Hash of the model's weights and of every setting that decides the trained autoencoder."""
    settings = json.dumps([clip.fingerprint(), profile.sae_settings()], sort_keys=True)
    return hashlib.sha256(settings.encode()).hexdigest()[:16]


def train_sae(profile: Profile, clip: Clip, ds: Images, folder: Path) -> tuple[SparseAutoencoder, pd.DataFrame]:
    """``train_saes`` of a single profile."""
    return train_saes([profile], clip, ds, [folder])[0]


def train_saes(profiles: Sequence[Profile], clip: Clip, ds: Images,
               folders: Sequence[Path]) -> list[tuple[SparseAutoencoder, pd.DataFrame]]:
    """Train the profiles' autoencoders in one pass over a data set, each from the last checkpoint in its folder on.

    Every image is read and every block computed once for all of them; each ends in the bytes that it has alone, so that
    a run may go on with others than it began with. The profiles must take the same images in one order (``rides``).
    Each folder gets ``checkpoint.safetensors`` every ``save_every`` steps, ``log.csv`` beside it, and at the end, in
    the checkpoint's place, the autoencoder itself, decoder rows of unit length. Returns these and the logs. Of several
    processes the first one writes.
    """
    if not profiles or not len(profiles) == len(folders) == len(set(folders)):
        raise ValueError(f"There are {len(profiles)} profiles and {len(folders)} folders; give each of at least one "
                         "profile a folder of its own.")
    runs = [_Run(profile, clip, folder) for profile, folder in zip(profiles, folders)]
    _begin(runs, ds)
    while not all(run.done for run in runs):
        _go_on(runs, ds)
    # The first one last: while it is not written, its checkpoint is there, and who asks for it again has it at once.
    return [run.finish() for run in reversed(runs)][::-1]


def _begin(runs: list["_Run"], ds: Images, room: int = 1) -> None:
    """Start runs, or take up their last checkpoints; with so many times the usual room for active latents."""
    new = [run for run in runs if not run.begun]
    fresh = iter(new_saes([run.profile for run in new], new[0].clip, ds) if new else ())
    for run in runs:
        run.begin(next(fresh) if run in new else None, room)


def _go_on(runs: list["_Run"], ds: Images) -> None:
    """Take the steps that are left. A run that is ahead of others waits for them; one that had too little room goes
    back to its checkpoint, and the pass with it."""
    steps = range(min(run.training.steps_done for run in runs), max(run.profile.sae.steps for run in runs))
    what = "training the autoencoder" if len(runs) == 1 else f"training {len(runs)} autoencoders"
    batches = training_batches([run.profile for run in runs], runs[0].clip, ds, steps)
    with tqdm(total=steps.stop, initial=steps.start, desc=what, mininterval=1,
              disable=processes.rank() > 0 or None) as bar:
        for step, found in zip(steps, batches):
            for run, z in zip(runs, found):
                if run.training.steps_done == step and not run.done:
                    try:
                        run.step(z)
                    except TooManyActive:
                        return _begin([run], ds, 2 * run.training.room // ROOM)
            bar.update()
            if runs[0].log:
                text = "mse {mse:.2e}, L0 {l0:.1f}, dead {dead:.0%}, EV {ev:.2f}"
                bar.set_postfix_str(text.format(**dict(zip(LOG_COLUMNS, runs[0].log[-1]))), refresh=False)


class _Run:
    """A training and its log, kept in a folder."""

    def __init__(self, profile: Profile, clip: Clip, folder: Path):
        self.profile, self.clip, self.folder, self.key = profile, clip, folder, run_key(profile, clip)
        saved = folder / "training.json"
        if saved.is_file() and load_json(saved, "key")["key"] != self.key:
            raise ValueError(f"{folder} holds a training with other settings; choose another folder or remove it.")

    @property
    def begun(self) -> bool:
        """Whether there is a checkpoint."""
        return (self.folder / "training.json").is_file()

    @property
    def done(self) -> bool:
        """Whether all steps are taken."""
        return self.training.steps_done >= self.profile.sae.steps

    def begin(self, fresh: SparseAutoencoder | None, room: int) -> None:
        """Start from an untrained autoencoder, or without one at the last checkpoint."""
        s, self.recent = self.profile.sae, []
        sae = _empty(self.profile, self.clip).to(self.clip.device) if fresh is None else fresh
        self.training = Training(sae, s.learning_rate, s.l1, s.warmup, s.dead_after, s.ghost, s.precision)
        if fresh is None:
            self.training.resume(self.folder)
        self.training.make_room(room)
        self.log = _read_log(self.folder / "log.csv", self.training.steps_done)

    def step(self, z: torch.Tensor) -> None:
        """Take a step; at a look add to the log, and where it is due save."""
        training = self.training
        self.recent.append(training.step(z))
        due = training.steps_done % self.profile.sae.save_every == 0 or self.done
        if due or training.looked:
            first = training.steps_done - len(self.recent) + 1
            self.log += [_log_row(first + i, step) for i, step in enumerate(self.recent)]
            self.recent.clear()
        if due:
            if not training.looked:
                training.look()
            self._save()

    def _save(self) -> None:
        # The log comes first: one that is ahead of its checkpoint is cut, one behind it would have a hole.
        if processes.rank() == 0:
            table = pd.DataFrame(self.log, columns=LOG_COLUMNS)
            write_atomically(self.folder / "log.csv", lambda path: table.to_csv(path, index=False))
        self.training.save(self.folder)
        if processes.rank() == 0:
            save_json(self.folder / "training.json", {"key": self.key})

    def finish(self) -> tuple[SparseAutoencoder, pd.DataFrame]:
        """Write the autoencoder in the place of the checkpoint; it and the log."""
        sae = self.training.trained()
        del self.training  # whose memory others want
        if processes.rank() == 0:
            sae.save_pretrained(self.folder)
            for name in ("training.json", "checkpoint.safetensors"):
                (self.folder / name).unlink(missing_ok=True)
        processes.wait()
        return sae, pd.DataFrame(self.log, columns=LOG_COLUMNS)


def _read_log(path: Path, steps_done: int) -> list[tuple]:
    """The rows of a log up to the step that its checkpoint is of."""
    if not steps_done:
        return []
    try:
        table = pd.read_csv(path)
        return [tuple(row) for row in table[table["step"] <= steps_done][LOG_COLUMNS].itertuples(index=False)]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} does not go with its checkpoint ({error}); remove the folder and train "
                         "again.") from error


def _log_row(number: int, step: Step) -> tuple:
    """The number of a step and what it gave."""
    return (number, *(round(value, 7) for value in torch.stack(step).tolist()))


guard(globals())
