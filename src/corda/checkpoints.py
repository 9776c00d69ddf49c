"""Checkpoints of the trainer, sealed once they are whole.

transformers keeps optimiser, scheduler and random states of a checkpoint in torch's own format, no artifact of corda,
and reads them with `weights_only=True`. corda notes the hash of every file when a checkpoint is complete and on the
disk, and continues from one whose files are those that were noted, and from no other.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from corda import artifact, disk
from corda.distributed import world
from corda.errors import ArtifactError

_log = logging.getLogger(__name__)
_SEAL = "corda.json"
_OWNER = "training.json"


class Sealing(TrainerCallback):  # type: ignore[misc]
    """Seals every checkpoint, and only then lets older ones go.

    Args:
        limit: How many checkpoints are kept; None for all.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the trainer on every process when its own files of a checkpoint are written."""
        world().wait()
        if state.is_world_process_zero:
            seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")
            _let_go(Path(args.output_dir), self.limit, state.best_model_checkpoint)
        world().wait()


def seal(checkpoint: Path) -> None:
    """Put a checkpoint on the disk and note what it consists of.

    Raises:
        ResourceError: no space, or it cannot be written.
    """
    with disk.explained(checkpoint):
        disk.sync_tree(checkpoint)
        files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
        noted = {str(path.relative_to(checkpoint)): artifact.file_hash(path) for path in files}
        artifact.write_json(checkpoint / _SEAL, {"files": noted, "seal": artifact.seal(noted)})
        disk.sync(checkpoint.parent)


def anew(folder: Path, fingerprint: str) -> None:
    """Let all checkpoints go and claim the folder, for a training that is not to be continued from any.

    Args:
        folder: For the checkpoints.
        fingerprint: Of all that the training depends on.
    """
    if folder.exists():
        shutil.rmtree(folder)
    _claim(folder, fingerprint)


def _claim(folder: Path, fingerprint: str) -> None:
    artifact.make_folder(folder)
    artifact.write_json(folder / _OWNER, {"fingerprint": fingerprint})


def last(folder: Path, fingerprint: str, limit: int | None = None) -> str | None:
    """The last whole checkpoint of this very training.

    Those of another training and those whose saving was interrupted are removed; so is one that was changed since,
    which is logged, and those beyond the limit, which a killed process had no time to let go.

    Args:
        folder: With the checkpoints.
        fingerprint: Of all that the training depends on.
        limit: How many are kept; None for all.
    """
    owner = folder / _OWNER
    known = artifact.read_json(owner) if owner.is_file() else None
    if folder.exists() and known != {"fingerprint": fingerprint}:
        shutil.rmtree(folder)
    _claim(folder, fingerprint)
    for checkpoint in sorted(folder.glob("checkpoint-*")):
        if not (checkpoint / _SEAL).is_file():
            shutil.rmtree(checkpoint)
            continue
        changed = _changed(checkpoint)
        if changed is not None:
            _log.warning(
                "%s of %s was changed after it was written: training continues from an earlier checkpoint or anew",
                changed,
                checkpoint,
            )
            shutil.rmtree(checkpoint)
    found: str | None = get_last_checkpoint(str(folder))
    _let_go(folder, limit, str(best(Path(found))) if found else None)
    return found


def best(checkpoint: Path) -> Path:
    """The checkpoint beside one that had the best evaluation when that one was written; without any, the one itself."""
    named = artifact.read_json(checkpoint / "trainer_state.json").get("best_model_checkpoint")
    beside = checkpoint.parent / Path(named).name if named else checkpoint
    return beside if (beside / _SEAL).is_file() else checkpoint


def _let_go(folder: Path, limit: int | None, kept: str | None) -> None:
    """Let older checkpoints go, but for the one to be kept."""
    rotate_checkpoints(output_dir=str(folder), save_total_limit=limit, best_model_checkpoint=kept)


def finished(checkpoint: Path) -> list[dict[str, Any]] | None:
    """The log of a training whose last step this checkpoint is, else None; resumed, the trainer would do one more."""
    state = artifact.read_json(checkpoint / "trainer_state.json")
    return list(state["log_history"]) if 0 < state["max_steps"] <= state["global_step"] else None


def _changed(checkpoint: Path) -> str | None:
    """Name of a file that is not as it was sealed, or None."""
    try:
        noted = artifact.read_json(checkpoint / _SEAL)
    except ArtifactError:
        return _SEAL
    files = noted.get("files")
    if not isinstance(files, dict) or noted.get("seal") != artifact.seal(files):
        return _SEAL
    for name, digest in files.items():
        path = checkpoint / name
        if not path.is_file() or artifact.file_hash(path) != digest:
            return str(name)
    return None
