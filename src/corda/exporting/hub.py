"""Upload a finished export to the Hub."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from corda.errors import ResourceError

# With the base of whatever HTTP library the Hub's uses: a refused connection is no error of the Hub.
_FAILURES: tuple[type[BaseException], ...] = (
    *HfHubHTTPError.__bases__,
    HFValidationError,
    LocalTokenNotFoundError,
    OSError,
)


def refuse_without_token(repository: str) -> None:
    """Find out before the work whether there is anybody to upload as.

    Raises:
        ResourceError: no token of the Hub is stored here.
    """
    if get_token() is None:
        raise _refused(repository, "no access token is stored on this machine")


def push(folder: Path, repository: str, with_local_base: str, *, private: bool | None) -> None:
    """Create the repository where it does not exist and upload the folder.

    Args:
        folder: A checked export.
        repository: OWNER/NAME.
        with_local_base: An adapter config in it that, if it is there, names its base by this machine's path of the
            folder; the uploaded copy names the repository instead.
        private: For a new repository; None: the Hub's default.

    Raises:
        ResourceError: no token, no permission, or no network.
    """
    api = HfApi()
    local = folder / with_local_base
    ignored = [with_local_base] if local.is_file() else None
    try:
        name = str(api.create_repo(repository, private=private, exist_ok=True).repo_id)
        api.upload_folder(repo_id=name, folder_path=folder, ignore_patterns=ignored, commit_message="Upload of corda")
        if ignored:
            config = json.loads(local.read_text(encoding="utf-8")) | {"base_model_name_or_path": name}
            content = json.dumps(config, indent=2, sort_keys=True).encode()
            api.upload_file(
                repo_id=name, path_or_fileobj=content, path_in_repo=with_local_base, commit_message="Upload of corda"
            )
    except _FAILURES as error:
        said = str(error).strip() or type(error).__name__
        raise _refused(repository, said.splitlines()[0]) from None


def _refused(repository: str, why: str) -> ResourceError:
    return ResourceError(
        "the export cannot be uploaded to the Hub",
        where=f"export.push_to_hub, {repository}",
        got=why,
        fix="log in with `hf auth login` and check the repository's name; a finished export is kept",
    )
