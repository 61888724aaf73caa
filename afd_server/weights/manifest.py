"""The list of files a model directory must hold, and the digest that names its content.

Knows nothing of tensors and imports no torch: every process may check a directory.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import file_digest, sha256
from pathlib import Path

from afd_server.core.errors import ModelError
from afd_server.core.model_spec import LoadFormat, read_json

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1
DUMMY_SEED = 0  # of the random weights of load format `dummy`

# 64 bits: two models of one cluster meet by chance once in 2^64, and it fits a log line.
_DIGEST_HEX_CHARS = 16
# The format's own limit on a safetensors header; a larger length means a damaged file.
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class FileEntry:
    """What the manifest says of one file; the hash is 64 lower-case hex characters."""

    size_bytes: int
    sha256: str


def write_manifest(directory: Path, source: str) -> None:
    """Write down every file of a directory with its size and SHA-256.

    Args:
        directory: a complete model directory; an older manifest in it is replaced.
        source: the name `afd-server pull` fetches these files by.
    """
    content = {
        "format_version": FORMAT_VERSION,
        "source": source,
        "files": {name: asdict(_entry(directory / name)) for name in _file_names(directory)},
    }
    text = json.dumps(content, indent=2) + "\n"
    (directory / MANIFEST_NAME).write_text(text, encoding="utf-8")


def verify_manifest(directory: Path) -> None:
    """Check that a directory holds what its manifest says.

    Sizes are compared before anything is hashed: a truncated download is found at once. A file
    that no manifest mentions is harmless unless it holds weights, which a reader would load.

    Raises:
        ModelError: the manifest cannot be read, or a file is missing, of the wrong size or
            content, or safetensors that nobody wrote down; the first such file is named.
    """
    source, files = _read_manifest(directory)
    for name, entry in files.items():
        _check_size(directory / name, entry, source)
    for name in _file_names(directory):
        if name.endswith(".safetensors") and name not in files:
            raise _refusal(directory / name, f"is not in {MANIFEST_NAME}", source)
    for name, entry in files.items():
        _check_hash(directory / name, entry, source)


def model_digest(directory: Path, load_format: LoadFormat = "auto") -> str:
    """Name the content of a model directory in 16 hex characters.

    With a manifest the digest covers the name and hash of every file. Without one, it covers
    config.json, the name, size and header of each *.safetensors and the size of tokenizer.json:
    hashing terabytes at every start is too slow, while shapes, dtypes and sizes already tell
    models of one family apart. Fine-tunes of one model may then share a digest. Of random
    weights it covers config.json and the seed, which decide over them.

    Raises:
        ModelError: a needed file is missing or damaged.
    """
    digest = sha256()
    has_manifest = (directory / MANIFEST_NAME).is_file()
    parts = _manifest_parts if has_manifest else _header_parts
    for part in _dummy_parts(directory) if load_format == "dummy" else parts(directory):
        # The length keeps "ab" + "c" apart from "a" + "bc".
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:_DIGEST_HEX_CHARS]


def _entry(path: Path) -> FileEntry:
    return FileEntry(size_bytes=path.stat().st_size, sha256=_hash(path))


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _file_names(directory: Path) -> list[str]:
    """Return what belongs to the model; a hidden directory holds what was made from it."""
    paths = (path for path in directory.rglob("*") if path.is_file())
    names = (path.relative_to(directory).as_posix() for path in paths)
    return sorted(name for name in names if name != MANIFEST_NAME and not name.startswith("."))


def _read_manifest(directory: Path) -> tuple[str, dict[str, FileEntry]]:
    content = read_json(directory / MANIFEST_NAME)
    version, source, files = (content.get(k) for k in ("format_version", "source", "files"))
    if version != FORMAT_VERSION or not isinstance(source, str) or not isinstance(files, dict):
        raise ModelError(
            f"{directory / MANIFEST_NAME} is no manifest of format {FORMAT_VERSION}; "
            "fetch the model anew with `afd-server pull NAME`"
        )
    return source, {name: _parse_entry(directory / name, files[name], source) for name in files}


def _parse_entry(path: Path, entry: object, source: str) -> FileEntry:
    if not isinstance(entry, Mapping):
        raise _refusal(path, f"has a malformed entry in {MANIFEST_NAME}", source)
    size_bytes, digest = entry.get("size_bytes"), entry.get("sha256")
    if not isinstance(size_bytes, int) or not isinstance(digest, str):
        raise _refusal(path, f"has a malformed entry in {MANIFEST_NAME}", source)
    return FileEntry(size_bytes=size_bytes, sha256=digest)


def _check_size(path: Path, entry: FileEntry, source: str) -> None:
    if not path.is_file():
        raise _refusal(path, "is missing", source)
    if (size_bytes := path.stat().st_size) != entry.size_bytes:
        raise _refusal(path, f"has {size_bytes} bytes, expected {entry.size_bytes}", source)


def _check_hash(path: Path, entry: FileEntry, source: str) -> None:
    if (digest := _hash(path)) != entry.sha256:
        raise _refusal(path, f"has SHA-256 {digest}, expected {entry.sha256}", source)


def _refusal(path: Path, fault: str, source: str) -> ModelError:
    return ModelError(f"{path} {fault}; fetch the model anew with `afd-server pull {source}`")


def _manifest_parts(directory: Path) -> list[bytes]:
    _, files = _read_manifest(directory)
    return [part.encode() for name in sorted(files) for part in (name, files[name].sha256)]


def _dummy_parts(directory: Path) -> list[bytes]:
    return [_existing(directory / "config.json").read_bytes(), b"dummy", str(DUMMY_SEED).encode()]


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ModelError(f"{path.parent} lacks {path.name}, which every model directory has")
    return path


def _header_parts(directory: Path) -> list[bytes]:
    config, tokenizer = (_existing(directory / f"{kind}.json") for kind in ("config", "tokenizer"))
    parts = [config.read_bytes(), str(tokenizer.stat().st_size).encode()]
    for path in sorted(directory.glob("*.safetensors")):
        parts += [path.name.encode(), str(path.stat().st_size).encode(), _header_bytes(path)]
    return parts


def _header_bytes(path: Path) -> bytes:
    """Read the length of a safetensors header (8 bytes, little-endian) and the header itself."""
    with path.open("rb") as file:
        prefix = file.read(8)
        num_bytes = int.from_bytes(prefix, "little")
        header = file.read(min(num_bytes, _MAX_HEADER_BYTES))
    if len(prefix) < 8 or len(header) < num_bytes:
        raise ModelError(f"{path} is truncated or damaged: its header is incomplete; copy it anew")
    return prefix + header
