"""The files of a run's directory, written so that an interruption leaves the old or the new, never half.

In the directory:

    run.json            the task, the model's configuration, the training options
    model.safetensors   the best weights so far
    checkpoint.pt       all that is needed to go on exactly: weights, optimiser, RNG, position, history
    history.jsonl, curves.png, report.json, and the task's own files (tokenizer.json, labels.json)
"""

from __future__ import annotations

import math
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import nn

from fastattn.models.fields import Range, check_value, shown
from fastattn.train.errors import CheckpointError, DataError, TrainingError, brief
from fastattn.train.input_files import is_list_of, read_json
from fastattn.train.memory import build
from fastattn.train.output_files import check_output_directory, create_file, json_text, write_file

FORMAT = "fastattn.checkpoint.1"
RUN, WEIGHTS, CHECKPOINT, LABELS = "run.json", "model.safetensors", "checkpoint.pt", "labels.json"
HISTORY = "history.jsonl"
MOST_BYTES_OF_JSON = 1 << 26

#: What a checkpoint holds beside its format and its task.
STATE = {
    "configuration": dict,
    "data": str,
    "model": dict,
    "optimizer": dict,
    "rng": dict,
    "history": list,
    "step": Annotated[int, Range(0, math.inf)],
    "epoch": Annotated[int, Range(0, math.inf)],
    "position": Annotated[int, Range(0, math.inf)],
    "seconds": Annotated[float, Range(0, math.inf)],
    "best": float | None,
    "evaluations_without_gain": Annotated[int, Range(0, math.inf)],
    "losses": list,
}


def require_new(directory: Path) -> None:
    """Raise unless ``directory`` is absent or free of a run's files: a run never overwrites another."""
    check_output_directory(directory, "--out")
    for name in (RUN, WEIGHTS, CHECKPOINT):
        if (directory / name).exists():
            raise _holds_a_run(directory, name)


def _holds_a_run(directory: Path, name: str) -> CheckpointError:
    return CheckpointError(
        f"{directory}: already holds a run ({name}); continue it with --resume or choose another --out"
    )


def claim(directory: Path, run: dict[str, Any]) -> None:
    """Describe a new run: of several who try at once, one can."""
    require_new(directory)
    try:
        create_file(directory / RUN, json_text(run))
    except FileExistsError:
        raise _holds_a_run(directory, RUN) from None


def is_only_claimed(directory: Path) -> bool:
    """Did the run end before its first checkpoint, so that to resume it is to start it?"""
    begun = any((directory / name).exists() for name in (CHECKPOINT, WEIGHTS, HISTORY))
    return not begun and (directory / RUN).exists()


def version(path: Path) -> tuple[int, int] | None:
    """What differs when a file has been written again; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def read_run(directory: Path, task: str | None = None) -> dict[str, Any]:
    """The run's description, checked to be one (of this task, if given)."""
    path = directory / RUN
    if not path.exists():
        raise CheckpointError(f"{directory}: holds no run ({RUN} is missing)")
    try:
        run = read_json(path, MOST_BYTES_OF_JSON)
    except DataError as error:
        raise CheckpointError(f"{path}: not a run's description ({error.problem})") from error
    if not isinstance(run, dict) or run.get("format") != FORMAT or not {"task", "model", "options"} <= run.keys():
        raise CheckpointError(f"{path}: not written by fastattn train")
    if task is not None and run["task"] != task:
        raise CheckpointError(f"{path}: a run of the task {shown(run['task'])}, not {task!r}")
    return run


def from_run(kind: type, values: Any, directory: Path) -> Any:
    """The dataclass ``kind`` of what a run's description holds of it."""
    path = directory / RUN
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: {kind.__name__} must be an object, got {shown(values)}")
    try:
        return kind(**values)
    except (TypeError, ValueError, TrainingError) as error:
        raise CheckpointError(f"{path}: not of this version of fastattn ({brief(error)})") from error


def load_model(model: type[nn.Module], config: type, directory: Path, task: str, attention: str | None) -> nn.Module:
    """The trained model of a run, in evaluation mode; with another implementation of attention, if one is given."""
    configuration = from_run(config, read_run(directory, task)["model"], directory)
    if attention:
        configuration = replace(configuration, attention=attention)
    try:
        loaded = build(model, configuration)
    except (ValueError, TrainingError) as error:
        raise CheckpointError(f"{directory / RUN}: {brief(error)}") from error
    load_weights(directory / WEIGHTS, loaded)
    return loaded.eval()


def read_labels(directory: Path, count: int) -> list[str]:
    """The names of the classes, by their number."""
    path = directory / LABELS
    try:
        labels = read_json(path, MOST_BYTES_OF_JSON)
    except DataError as error:
        raise CheckpointError(f"{path}: missing, or not JSON ({error.problem})") from error
    if not is_list_of(labels, str) or len(labels) != count:
        raise CheckpointError(f"{path}: must be a list of the names of {count} classes, got {shown(labels)}")
    return labels


def save_weights(path: Path, model: nn.Module) -> None:
    """The model's state dict as safetensors; tensors that are tied are stored once."""
    from safetensors.torch import save_model

    # save_model names the dropped duplicates of tied tensors in the metadata, and load_model ties them again.
    write_file(path, lambda temporary: save_model(model, str(temporary)))


def not_these_weights(path: Path, error: Exception) -> CheckpointError:
    """What to raise for weights of another model; torch names every parameter, which is too much."""
    return CheckpointError(f"{path}: the weights are not this model's ({brief(error)})")


def load_weights(path: Path, model: nn.Module) -> None:
    """Load :func:`save_weights`' file into a model of the same configuration."""
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    if not path.exists():
        raise CheckpointError(f"{path}: missing")
    try:
        load_model(model, str(path))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a safetensors file, or truncated ({brief(error)})") from error
    except RuntimeError as error:
        raise not_these_weights(path, error) from error


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:  # torch takes no name that begins with a dot
            torch.save({"format": FORMAT, **state}, file)

    write_file(path, write)


def load_checkpoint(path: Path, task: str) -> dict[str, Any]:
    """The state that :func:`save_checkpoint` wrote, each entry of its type in :data:`STATE`.

    Nothing in the file is executed (weights_only), nor does it expand: torch compresses none.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: missing; the run cannot be resumed")
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [member.filename for member in archive.infolist() if member.compress_type != zipfile.ZIP_STORED]
        if packed:
            raise ValueError(f"{shown(packed[0])} is compressed")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for what is not a checkpoint
        raise CheckpointError(f"{path}: truncated, or not a checkpoint ({brief(error)})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of fastattn train")
    if state.get("task") != task:
        raise CheckpointError(f"{path}: a checkpoint of the task {shown(state.get('task'))}, not {task!r}")
    missing = [name for name in STATE if name not in state]
    if missing:
        raise CheckpointError(f"{path}: not a whole checkpoint: {', '.join(missing)} missing")
    for name, hint in STATE.items():
        try:
            check_value(name, state[name], hint)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: not a checkpoint: {error}") from error
    if not is_list_of(state["losses"], float):
        raise CheckpointError(f"{path}: not a checkpoint: losses must be numbers")
    return state
