"""From a hub id, an address on an object store or a path to a local directory in HF format."""

from pathlib import Path

import huggingface_hub
from huggingface_hub import errors

from cft_jax.common.errors import UserError
from cft_jax.common.hub_access import HTTP_ERROR, hub_answers
from cft_jax.common.stores import fetched, is_remote

# No pickles (.bin, .pth) and no code; nothing of subdirectories, where gpt-oss keeps its weights a second time.
_PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def resolve(path_or_id: str, *, revision: str, local_files_only: bool) -> tuple[Path, str]:
    """The directory of a checkpoint, downloaded if need be, and the commit of a hub id (empty for a directory).

    Args:
      path_or_id: a directory, an address such as gs://bucket/qwen3, or a hub id such as "Qwen/Qwen3-0.6B".
      revision: branch, tag or commit of a hub id; directories ignore it.
      local_files_only: take a hub id from the local cache alone.

    Raises:
      UserError: there is no such directory or id, it is gated, or the hub or the store cannot be reached.
    """
    if is_remote(path_or_id):
        return fetched(path_or_id, _PATTERNS), ""
    path = Path(path_or_id).expanduser()
    if path_or_id and path.is_dir():
        return path.resolve(), ""
    if path_or_id and path.exists():
        raise UserError(f"checkpoint {path_or_id!r} is a file; give the directory that holds it")
    if not path_or_id or path_or_id.count("/") > 1 or path_or_id.startswith((".", "/", "~")):
        raise UserError(f"checkpoint {path_or_id!r}: no such directory; give a directory in HF format or a hub id")
    try:
        found = huggingface_hub.snapshot_download(
            path_or_id,
            revision=revision,
            local_files_only=local_files_only or not hub_answers(),
            allow_patterns=list(_PATTERNS),
            ignore_patterns=["*/*"],
        )
    except (HTTP_ERROR, errors.HFValidationError, OSError, ValueError) as error:
        raise UserError(_problem(path_or_id, revision, local_files_only, error)) from error
    return Path(found), Path(found).name


def _problem(name: str, revision: str, local_files_only: bool, error: Exception) -> str:
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{name} is gated: accept its licence at https://huggingface.co/{name} and set HF_TOKEN to a token of "
            "that account"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name} has no revision {revision!r}; set config.model.revision to a branch, tag or commit of it"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{name} is no directory and no public model of the hub; check the name, or HF_TOKEN if it is private"
    if isinstance(error, errors.HFValidationError):
        return f"{name!r} is no directory and no valid hub id"
    if local_files_only or isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return (
            f"{name} at revision {revision!r} is not in the local cache and the hub was not asked or not reached; "
            "check the network, HF_HUB_OFFLINE and config.model.local_files_only, or give a local directory"
        )
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{name} cannot be had from the hub ({first}); check the network and HF_TOKEN, or give a local directory"
