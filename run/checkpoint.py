"""Checkpoints: the trained weights, the optimizer's state and the progress, published whole.

A checkpoint is a folder with the hashes of its files (`files.py`), and names its run. Data order
and dropout are functions of (seed, epoch, row), so there is no random state to save.
"""

import json
from dataclasses import asdict

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import nn

from errors import TrainingFailed
from files import damage, json_bytes, remove_folder, write_folder
from run.folder import CHECKPOINT_FILES, KEEP, Progress, Run, progress_of
from run.identity import program


def save_checkpoint(
    run: Run,
    progress: Progress,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> None:
    """Write `checkpoints/step-...` whole, then remove the oldest; TrainingFailed if it cannot be
    read back.
    """
    final = run.folder / "checkpoints" / f"step-{progress.cursor:06d}"
    tensors = {name: p.detach() for name, p in parameters.items()}
    for name, p in parameters.items():
        for key, value in optimizer.state.get(p, {}).items():
            tensors[f"{key}/{name}"] = value
    state = {"progress": asdict(progress), "scaler": scaler.state_dict()}
    files = {
        "state.safetensors": save({k: t.cpu().contiguous() for k, t in tensors.items()}),
        "progress.json": json_bytes({"run": run.id, **program(), **state}),
    }
    write_folder(final, files)
    if reason := damage(final, CHECKPOINT_FILES):  # then the older ones must stay
        raise TrainingFailed(f"{final} was not written correctly: {reason}", "check the disk")
    run.record_checkpoint()
    for old in run.checkpoints()[:-KEEP]:
        remove_folder(old)


def load_checkpoint(
    run: Run,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> Progress:
    """Restore the newest checkpoint of `run`, in place; a fresh Progress if it has none."""
    if not run.checkpoints():
        return Progress()
    newest = run.checkpoints()[-1]
    saved = json.loads((newest / "progress.json").read_text("utf-8"))
    with safe_open(newest / "state.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(tensors[name])
    state = {
        i: {key: tensors[f"{key}/{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        for i, name in enumerate(parameters)
        if f"step/{name}" in tensors
    }
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    if saved["scaler"]:
        scaler.load_state_dict(saved["scaler"])
    return progress_of(saved["progress"], newest)
