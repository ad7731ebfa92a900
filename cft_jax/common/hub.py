"""Checkpoints and tokenizers from a hub id, an address on an object store or a path to a directory in HF format."""

import functools
import time
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
from absl import logging
from huggingface_hub import constants, errors, get_session

from cft_jax.common.errors import UserError
from cft_jax.common.storage import fetched, is_remote

# No pickles (.bin, .pth) and no code; nothing of subdirectories, where gpt-oss keeps its weights a second time.
TOKENIZER = ("*.json", "*.model", "*.txt", "*.jinja")
CHECKPOINT = (*TOKENIZER, "*.safetensors")
# Of requests or of httpx, as the version has it; httpx's connection errors are no OSErrors.
_HTTP_ERROR: type[Exception] = errors.HfHubHTTPError.__mro__[1]
_TIMEOUT_SECONDS = 10
_PAUSES = (0.0, 2.0)


@functools.cache
def hub_answers() -> bool:
    """Whether the hub can be asked; False too where HF_HUB_OFFLINE forbids it.

    Its own client asks for every file anew, five times, with pauses between: without a network, a minute of warnings.
    What it answers is of no interest here: an error of its own comes with a message later.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    reason = ""
    for pause in _PAUSES:
        time.sleep(pause)
        try:
            get_session().head(constants.ENDPOINT, timeout=_TIMEOUT_SECONDS)
            return True
        except (_HTTP_ERROR, OSError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    logging.info("%s does not answer (%s); only what was downloaded before is used", constants.ENDPOINT, reason)
    return False


def resolve(
    path_or_id: str, *, revision: str, local_files_only: bool, patterns: Sequence[str] = CHECKPOINT
) -> tuple[Path, str]:
    """The directory of a checkpoint, downloaded if need be, and the commit of a hub id (empty for a directory).

    Args:
      path_or_id: a directory, an address such as gs://bucket/qwen3, or a hub id such as "Qwen/Qwen3-0.6B".
      revision: branch, tag or commit of a hub id; directories ignore it.
      local_files_only: take a hub id from the local cache alone.
      patterns: of the files to download.

    Raises:
      UserError: there is no such directory or id, it is gated, or the hub or the store cannot be reached.
    """
    if is_remote(path_or_id):
        return fetched(path_or_id, patterns), ""
    path = Path(path_or_id).expanduser()
    if path_or_id and path.is_dir():
        return path.resolve(), ""
    if path_or_id and path.exists():
        raise UserError(f"checkpoint {path_or_id!r} is a file; give the directory that holds it")
    if not path_or_id or path_or_id.count("/") > 1 or path_or_id.startswith((".", "/", "~")):
        raise UserError(f"checkpoint {path_or_id!r}: no such directory; give a directory in HF format or a hub id")
    try:
        directory = huggingface_hub.snapshot_download(
            path_or_id,
            revision=revision,
            local_files_only=local_files_only or not hub_answers(),
            allow_patterns=list(patterns),
            ignore_patterns=["*/*"],
        )
    except (_HTTP_ERROR, errors.HFValidationError, OSError, ValueError) as error:
        raise UserError(_problem(path_or_id, revision, local_files_only, error)) from error
    return Path(directory), Path(directory).name


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
    absent = f"{name} at revision {revision!r} is not in the local cache"
    if local_files_only:
        return f"{absent}; set config.model.local_files_only=False to download it, or give a directory"
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return f"{absent} and the hub does not answer; check the network and HF_HUB_OFFLINE, or give a directory"
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{name} cannot be had from the hub ({first}); check the network and HF_TOKEN, or give a local directory"
