"""The training loop (sec. 3.1, A.1): exact steps, a log, checkpoints, and resuming to the same bytes."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm

from patchsae.activations import training_rows, training_tokens
from patchsae.checkpoints import load_json, load_tensors, save_json, save_tensors, write_atomically
from patchsae.clip import Clip
from patchsae.config import ROOT, Profile
from patchsae.sae import Losses, SparseAutoencoder, initial_b_dec, sae_loss

LOG_COLUMNS = ["step", "mse", "l1", "ghost", "total", "l0", "dead", "ev"]


class Training:
    """An autoencoder with its optimiser and its dead-latent counters: what a step reads and changes.

    ``quiet [S]``: for each latent, how many steps in a row it has fired on no token.
    """

    def __init__(self, sae: SparseAutoencoder, lr: float = 4e-4, l1: float = 8e-5, warmup: int = 500,
                 dead_after: int = 64, ghost: bool = True):
        self.sae, self.lr, self.l1, self.warmup = sae, lr, l1, warmup
        self.dead_after, self.ghost, self.steps_done = dead_after, ghost, 0
        self.optimizer = torch.optim.Adam(sae.parameters(), lr=lr)
        self.quiet = torch.zeros(sae.n_latents, dtype=torch.long, device=sae.W_enc.device)

    @property
    def dead(self) -> torch.Tensor:
        """Latents that have not fired for more than ``dead_after`` steps: bool ``[S]``."""
        return self.quiet > self.dead_after

    def step(self, z: torch.Tensor) -> Losses:
        """One step on tokens ``[...,D]``."""
        self.sae.normalise_decoder()
        losses = sae_loss(self.sae, z, self.l1, self.dead if self.ghost else None)
        if not losses.total.isfinite():
            raise ValueError(f"The loss of step {self.steps_done} is {losses.total.item()}: the tokens hold NaN or "
                             "infinity, or the learning rate is too high; check the images and the profile.")
        self.optimizer.zero_grad()
        losses.total.backward()
        self.sae.remove_parallel_gradient()
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * min(1.0, (self.steps_done + 1) / max(1, self.warmup))
        self.optimizer.step()
        self.sae.update_threshold(losses.h)
        fired = (losses.h.detach() > 0).flatten(0, -2).any(0)
        self.quiet = torch.where(fired, 0, self.quiet + 1)
        self.steps_done += 1
        return losses

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything a later step depends on, by name."""
        state = {f"sae.{name}": p for name, p in self.sae.state_dict().items()} | {"quiet": self.quiet}
        names = [name for name, _ in self.sae.named_parameters()]
        for i, moments in self.optimizer.state_dict()["state"].items():
            state |= {f"adam.{names[i]}.{key}": torch.as_tensor(value) for key, value in moments.items()}
        return state

    def save(self, folder: Path) -> None:
        """Write a checkpoint: one file of tensors, so that it is there whole or not at all."""
        tensors = self.tensors() | {"steps_done": torch.tensor(self.steps_done)}
        save_tensors(Path(folder) / "checkpoint.safetensors", tensors)

    def resume(self, folder: Path) -> None:
        """Continue from a checkpoint."""
        path = Path(folder) / "checkpoint.safetensors"
        tensors = load_tensors(path, str(self.quiet.device))
        needed = {"quiet", "steps_done", *(f"sae.{name}" for name in self.sae.state_dict())}
        if missing := sorted(needed - set(tensors)):
            raise ValueError(f"{path} lacks {missing[0]}; remove the folder and train again.")
        self.sae.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("sae.")})
        self.quiet, self.steps_done = tensors["quiet"], int(tensors["steps_done"])
        state = self.optimizer.state_dict()
        for i, (name, _) in enumerate(self.sae.named_parameters()):
            prefix = f"adam.{name}."
            state["state"][i] = {k[len(prefix):]: v.cpu() if k.endswith(".step") else v
                                 for k, v in tensors.items() if k.startswith(prefix)}
        self.optimizer.load_state_dict(state)


def train_steps(sae: SparseAutoencoder, batches, lr: float = 4e-4, l1: float = 8e-5, warmup: int = 500,
                dead_after: int = 64, ghost: bool = True) -> torch.Tensor:
    """Train in place on an iterable of tokens ``[...,D]``; returns ``[steps,4]`` = mse, l1, ghost, total."""
    training = Training(sae, lr, l1, warmup, dead_after, ghost)
    history = [torch.stack(training.step(z)[:4]).detach() for z in batches]
    if not history:
        raise ValueError("There are no batches to train on; give at least one.")
    return torch.stack(history)


def new_sae(profile: Profile, clip: Clip, ds) -> SparseAutoencoder:
    """An untrained autoencoder of the profile's width, b_dec set from the first eight batches."""
    generator = torch.Generator().manual_seed(profile.seed)
    s = profile.sae
    sae = SparseAutoencoder(clip.width, round(s.expansion * clip.width), generator, s.activation, s.k)
    first = torch.cat(list(_tokens(profile, clip, ds, range(8))))
    sae.b_dec.data = initial_b_dec(first, profile.sae.b_dec)
    return sae.to(clip.device)


def train_sae(profile: Profile, clip: Clip, ds, folder: Path) -> tuple[SparseAutoencoder, pd.DataFrame]:
    """Train the profile's autoencoder on a data set, or continue from the last checkpoint in ``folder``.

    Writes ``checkpoint.safetensors`` every ``save_every`` steps, ``log.csv`` beside it, and at the end, in the
    checkpoint's place, the autoencoder itself, decoder rows of unit length. Returns it and the log.
    """
    folder, key = Path(folder), run_key(profile, clip)
    if profile.sae.weights:
        return _given(profile, clip, folder)
    training = _start_or_resume(profile, clip, ds, folder, key)
    log = _read_log(folder, training.steps_done)
    bar = tqdm(total=profile.sae.steps, initial=training.steps_done, desc="training the autoencoder", mininterval=1)
    with bar:
        for z in _tokens(profile, clip, ds, range(training.steps_done, profile.sae.steps)):
            log.append(_log_row(training, z, training.step(z)))
            bar.update()
            now = dict(zip(LOG_COLUMNS, log[-1]))
            text = "mse {mse:.2e}, L0 {l0:.1f}, dead {dead:.0%}, EV {ev:.2f}".format(**now)
            bar.set_postfix_str(text, refresh=False)
            if training.steps_done % profile.sae.save_every == 0 or training.steps_done == profile.sae.steps:
                _save(training, log, folder, key)
    training.sae.normalise_decoder()
    training.sae.save_pretrained(folder)
    for name in ("training.json", "checkpoint.safetensors"):
        (folder / name).unlink(missing_ok=True)
    return training.sae, pd.DataFrame(log, columns=LOG_COLUMNS)


def _given(profile: Profile, clip: Clip, folder: Path) -> tuple[SparseAutoencoder, pd.DataFrame]:
    """The autoencoder that the profile names, kept in ``folder`` as a trained one would be; its log has no numbers."""
    path = ROOT / profile.sae.weights
    sae = SparseAutoencoder.from_pretrained(path if path.exists() else profile.sae.weights, clip.device)
    if sae.d_model != clip.width:
        raise ValueError(f"{profile.sae.weights} is for tokens of width {sae.d_model}, but {profile.model.name} has "
                         f"{clip.width}; choose an autoencoder of this model.")
    sae.save_pretrained(folder)
    return sae, pd.DataFrame([(0, *[float("nan")] * (len(LOG_COLUMNS) - 1))], columns=LOG_COLUMNS)


def run_key(profile: Profile, clip: Clip) -> str:
    """Hash of the model's weights and of every setting that decides the trained autoencoder."""
    settings = json.dumps([clip.fingerprint(), profile.sae_settings()], sort_keys=True)
    return hashlib.sha256(settings.encode()).hexdigest()[:16]


def run_folder(profile: Profile, clip: Clip) -> Path:
    """Where the profile's own training goes."""
    return profile.run_dir / "sae" / run_key(profile, clip)


def committed_folder(profile: Profile, clip: Clip) -> Path:
    """Where the committed autoencoder of exactly these settings would be."""
    return profile.data_dir / "sae" / run_key(profile, clip)


def committed_log(profile: Profile, clip: Clip) -> pd.DataFrame | None:
    """The log of the committed training of exactly these settings, every tenth step of it, or None."""
    path = committed_folder(profile, clip) / "log.csv"
    return pd.read_csv(path) if path.is_file() else None


def trained_sae(profile: Profile, clip: Clip, ds) -> SparseAutoencoder:
    """The profile's autoencoder: committed or trained before, else trained now on ``ds``."""
    for folder in (committed_folder(profile, clip), run_folder(profile, clip)):
        if (folder / "sae.safetensors").is_file():
            return SparseAutoencoder.from_pretrained(folder, clip.device)
    return train_sae(profile, clip, ds, folder)[0]


def _tokens(profile: Profile, clip: Clip, ds, steps: range) -> Iterator[torch.Tensor]:
    """Tokens of each training step: whole images ``[B,T,D]``, or their class tokens ``[B,1,D]``."""
    rows = [training_rows(len(ds), step, profile.sae.batch_images, profile.seed) for step in steps]
    for z in training_tokens(clip, ds, profile.model.layer).batches(rows):
        yield z[:, :1] if profile.sae.tokens == "cls" else z


def _start_or_resume(profile: Profile, clip: Clip, ds, folder: Path, key: str) -> Training:
    s, saved = profile.sae, folder / "training.json"
    if not saved.is_file():
        return Training(new_sae(profile, clip, ds), s.learning_rate, s.l1, s.warmup, s.dead_after, s.ghost)
    if load_json(saved, "key")["key"] != key:
        raise ValueError(f"{folder} holds a training with other settings; choose another folder or remove it.")
    sae = SparseAutoencoder(clip.width, round(s.expansion * clip.width), None, s.activation, s.k).to(clip.device)
    training = Training(sae, s.learning_rate, s.l1, s.warmup, s.dead_after, s.ghost)
    training.resume(folder)
    return training


def _log_row(training: Training, z: torch.Tensor, losses: Losses) -> tuple:
    """Losses and what the latents did, after a step on ``z``."""
    with torch.no_grad():
        tokens, error = z.flatten(0, -2), (losses.z_hat - z).flatten(0, -2)
        explained = 1 - error.square().sum() / (tokens - tokens.mean(0)).square().sum()
        l0, dead = (losses.h > 0).sum(-1).float().mean(), training.dead.float().mean()
        return (training.steps_done, *(round(v.item(), 7) for v in (*losses[:4], l0, dead, explained)))


def _save(training: Training, log: list, folder: Path, key: str) -> None:
    # The log and the key come first: a log that is ahead of its checkpoint is cut, one behind it would have a hole.
    table = pd.DataFrame(log, columns=LOG_COLUMNS)
    write_atomically(folder / "log.csv", lambda path: table.to_csv(path, index=False))
    training.save(folder)
    save_json(folder / "training.json", {"key": key})


def _read_log(folder: Path, steps_done: int) -> list:
    if steps_done == 0:
        return []
    path = folder / "log.csv"
    try:
        table = pd.read_csv(path)
        return [tuple(row) for row in table[table["step"] <= steps_done][LOG_COLUMNS].itertuples(index=False)]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} does not go with its checkpoint ({error}); remove the folder and train "
                         "again.") from error
