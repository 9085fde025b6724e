"""Training runs (sec. 3.1, A.1): a log, checkpoints, and going on to the same bytes.

``accelerate launch -m patchsae train --profile paper`` trains on as many devices as there are.
"""

import dataclasses
import hashlib
import json
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm

from patchsae.buffer import training_batches
from patchsae.clip import Clip
from patchsae.config import ROOT, Profile
from patchsae.fast import processes
from patchsae.sae import SparseAutoencoder, initial_b_dec
from patchsae.steps import Step, TooManyActive, Training
from patchsae.weights.files import load_json, save_json, write_atomically

LOG_COLUMNS = ["step", *Step._fields]


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
    sae = _empty(profile, clip)
    whole = dataclasses.replace(profile, sae=dataclasses.replace(profile.sae, shuffle="images"))
    first = torch.cat(processes.gathered(torch.cat(list(training_batches(whole, clip, ds, range(8))))))
    sae.b_dec.data = initial_b_dec(first, profile.sae.b_dec)
    return sae.to(clip.device)


def train_sae(profile: Profile, clip: Clip, ds, folder: Path) -> tuple[SparseAutoencoder, pd.DataFrame]:
    """Train the profile's autoencoder on a data set, or continue from the last checkpoint in ``folder``.

    Writes ``checkpoint.safetensors`` every ``save_every`` steps, ``log.csv`` beside it, and at the end, in the
    checkpoint's place, the autoencoder itself, decoder rows of unit length. Returns it and the log. Of several
    processes the first one writes.
    """
    folder, key = Path(folder), run_key(profile, clip)
    if profile.sae.weights:
        return _given(profile, clip, folder)
    training = _start_or_resume(profile, clip, ds, folder, key)
    log = _read_log(folder, training.steps_done)
    while training.steps_done < profile.sae.steps:
        try:
            _train(training, log, profile, clip, ds, folder, key)
        except TooManyActive:
            training = _start_or_resume(profile, clip, ds, folder, key, room=2 * training.room)
            log = _read_log(folder, training.steps_done)
    sae = training.trained()
    if processes.rank() == 0:
        sae.save_pretrained(folder)
        for name in ("training.json", "checkpoint.safetensors"):
            (folder / name).unlink(missing_ok=True)
    processes.wait()
    return sae, pd.DataFrame(log, columns=LOG_COLUMNS)


def _train(training: Training, log: list, profile: Profile, clip: Clip, ds, folder: Path, key: str) -> None:
    """Take all steps that are left, adding to the log and saving on the way."""
    steps, recent = profile.sae.steps, []
    bar = tqdm(total=steps, initial=training.steps_done, desc="training the autoencoder", mininterval=1,
               disable=processes.rank() > 0 or None)
    with bar:
        for z in training_batches(profile, clip, ds, range(training.steps_done, steps)):
            recent.append(training.step(z))
            bar.update()
            due = training.steps_done % profile.sae.save_every == 0 or training.steps_done == steps
            if due or training.looked:
                first = training.steps_done - len(recent) + 1
                log += [_log_row(first + i, step) for i, step in enumerate(recent)]
                recent.clear()
                text = "mse {mse:.2e}, L0 {l0:.1f}, dead {dead:.0%}, EV {ev:.2f}"
                bar.set_postfix_str(text.format(**dict(zip(LOG_COLUMNS, log[-1]))), refresh=False)
            if due:
                if not training.looked:
                    training.look()
                _save(training, log, folder, key)


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


def _start_or_resume(profile: Profile, clip: Clip, ds, folder: Path, key: str, room: int = 3) -> Training:
    s, saved = profile.sae, folder / "training.json"
    there = saved.is_file()
    if there and load_json(saved, "key")["key"] != key:
        raise ValueError(f"{folder} holds a training with other settings; choose another folder or remove it.")
    sae = _empty(profile, clip).to(clip.device) if there else new_sae(profile, clip, ds)
    training = Training(sae, s.learning_rate, s.l1, s.warmup, s.dead_after, s.ghost, s.precision, room)
    if there:
        training.resume(folder)
    return training


def _empty(profile: Profile, clip: Clip) -> SparseAutoencoder:
    """An autoencoder of the profile's shape with its first weights, b_dec aside."""
    generator = torch.Generator().manual_seed(profile.seed)
    s = profile.sae
    return SparseAutoencoder(clip.width, round(s.expansion * clip.width), generator, s.activation, s.k)


def _log_row(number: int, step: Step) -> tuple:
    """The number of a step and what it gave."""
    return (number, *(round(value, 7) for value in torch.stack(step).tolist()))


def _save(training: Training, log: list, folder: Path, key: str) -> None:
    # The log comes first: one that is ahead of its checkpoint is cut, one behind it would have a hole.
    if processes.rank() == 0:
        table = pd.DataFrame(log, columns=LOG_COLUMNS)
        write_atomically(folder / "log.csv", lambda path: table.to_csv(path, index=False))
    training.save(folder)
    if processes.rank() == 0:
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
