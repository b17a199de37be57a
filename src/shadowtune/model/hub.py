"""Models on the Hugging Face Hub: download one into the cache, upload files. Errors are one line."""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from shadowtune.errors import CheckpointError, ConfigError
from shadowtune.model.deferral_files import FILE
from shadowtune.model.files import one_line, reading

OTHER_FORMATS = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".ot", ".gguf", ".onnx", ".onnx_data")
"""Suffixes of weights that are not downloaded where a repository has safetensors."""
CONNECTION_ERRORS: tuple[type[Exception], ...] = (OSError, *HfHubHTTPError.__bases__)
"""What calls raise without a connection: the bases are the errors of the HTTP library, which differs by version."""
REASONS = {
    401: "not logged in, or no such repository; log in with hf auth login, or set HF_TOKEN",
    403: "the token may not do that; use one with access to it, with hf auth login or HF_TOKEN",
    404: "there is no such repository or organization, or the token may not see it",
}


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a Hub id, "org/name"."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def download_model(repository: str) -> Path:
    """Return a local directory with the files of a model on the Hub, or its one GGUF file.

    Weights are downloaded in one format. Without a connection the files of an earlier download are used.

    Raises:
        CheckpointError: if it does not exist, cannot be read, or cannot be reached and was not downloaded before.
    """
    with _hub_errors(f"cannot load {repository}, which is nothing on this machine, from the Hub"):
        files = _files_of(repository)
        if files is None:
            return _only_gguf(Path(snapshot_download(repository, local_files_only=True)))
        root = [name for name in files if "/" not in name]
        ggufs = [name for name in root if name.endswith(".gguf")]
        if any(name.endswith(".safetensors") for name in root):
            root = [name for name in root if not name.endswith(OTHER_FORMATS)]
        elif len(ggufs) == 1 and "model.onnx" not in root:
            if (head := f"{ggufs[0].removesuffix('.gguf')}.{FILE}") in root:
                hf_hub_download(repository, head)
            return Path(hf_hub_download(repository, ggufs[0]))
        elif ggufs:
            names = ", ".join(ggufs)
            raise CheckpointError(f"{repository} has several GGUF files ({names}); download one and name the file")
        return Path(snapshot_download(repository, allow_patterns=root))


def upload_model(files: Mapping[str, Path | bytes], repository: str, public: bool, message: str) -> str:
    """Upload files in one commit, making the repository if need be; return its address.

    Args:
        files: path in the repository -> file or contents.
        repository: "org/name".
        public: whether others may see it.
        message: of the commit.

    Raises:
        ConfigError: if the repository exists and is public, which ``public`` does not allow.
        CheckpointError: if it cannot be made or written.
    """
    with _hub_errors(f"cannot push to {repository}"):
        api = HfApi()
        address = api.create_repo(repository, private=not public, exist_ok=True)
        if not public and not api.model_info(repository).private:
            raise ConfigError(f"{repository} exists already and is public; pass --public, or name another one")
        operations = [
            CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in files.items()
        ]
        api.create_commit(repository, operations, commit_message=message)
        return str(address)


def _files_of(repository: str) -> list[str] | None:
    """Return the names of a repository's files; None if the Hub cannot be reached."""
    try:
        return list(HfApi().list_repo_files(repository))
    except HfHubHTTPError:
        raise
    except CONNECTION_ERRORS:
        return None


def _only_gguf(directory: Path) -> Path:
    """Return the one GGUF file of a directory without a model beside it, else the directory."""
    ggufs = list(directory.glob("*.gguf"))
    beside = any((directory / name).is_file() for name in ("config.json", "adapter_config.json"))
    return ggufs[0] if len(ggufs) == 1 and not beside else directory


@contextlib.contextmanager
def _hub_errors(what: str) -> Iterator[None]:
    """Turn errors of the Hub and of the connection into a CheckpointError that begins with ``what``."""
    with reading(what):
        try:
            yield
        except HfHubHTTPError as error:
            reason = REASONS.get(error.response.status_code, error.server_message or one_line(error))
            raise CheckpointError(f"{what}: {reason}") from None
        except LocalTokenNotFoundError:
            raise CheckpointError(f"{what}: {REASONS[401]}") from None
        except OfflineModeIsEnabled:
            offline = os.environ.get("HF_HUB_OFFLINE", "")
            raise CheckpointError(f"{what}: HF_HUB_OFFLINE={offline} allows no connection") from None
