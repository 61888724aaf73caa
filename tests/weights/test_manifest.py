import json
import subprocess
import sys
from pathlib import Path

import pytest

from afd_server.core.errors import ModelError
from afd_server.weights import manifest
from afd_server.weights.manifest import (
    MANIFEST_NAME,
    model_digest,
    verify_manifest,
    write_manifest,
)

HEADER = b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'
WEIGHTS = len(HEADER).to_bytes(8, "little") + HEADER + b"\x01\x02\x03\x04"


@pytest.fixture
def directory(tmp_path):
    """A model directory as far as this module looks, without a manifest."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(WEIGHTS)
    return tmp_path


def overwrite_last_byte(path):
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_an_untouched_directory_verifies(directory):
    write_manifest(directory, "org/tiny")
    verify_manifest(directory)


def test_the_manifest_lists_every_file_but_itself_in_order(directory):
    (directory / "more").mkdir()
    (directory / "more" / "notes.txt").write_text("hello")
    write_manifest(directory, "org/tiny")
    write_manifest(directory, "org/tiny")  # the second time, the first manifest is there
    content = json.loads((directory / MANIFEST_NAME).read_text())
    assert content["source"] == "org/tiny"
    expected = ["config.json", "model.safetensors", "more/notes.txt", "tokenizer.json"]
    assert list(content["files"]) == expected
    assert content["files"]["more/notes.txt"] == {
        "size_bytes": 5,
        "sha256": "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824",
    }


def test_a_truncated_file_is_named_with_both_sizes(directory):
    write_manifest(directory, "org/tiny")
    (directory / "model.safetensors").write_bytes(WEIGHTS[:-1])
    with pytest.raises(ModelError, match=rf"model.safetensors has {len(WEIGHTS) - 1} bytes"):
        verify_manifest(directory)


def test_a_flipped_bit_is_found_and_the_remedy_named(directory):
    write_manifest(directory, "org/tiny")
    overwrite_last_byte(directory / "model.safetensors")
    with pytest.raises(ModelError, match=r"SHA-256 .* `afd-server pull org/tiny`"):
        verify_manifest(directory)


def test_a_missing_file_is_named(directory):
    write_manifest(directory, "org/tiny")
    (directory / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer.json is missing"):
        verify_manifest(directory)


def test_weights_that_nobody_wrote_down_are_refused(directory):
    write_manifest(directory, "org/tiny")
    (directory / "adapter.safetensors").write_bytes(WEIGHTS)
    with pytest.raises(ModelError, match=r"adapter.safetensors is not in manifest.json"):
        verify_manifest(directory)


def test_a_note_beside_the_model_does_no_harm(directory):
    write_manifest(directory, "org/tiny")
    (directory / "README.md").write_text("mine")
    verify_manifest(directory)


def test_weights_packed_at_an_earlier_start_are_no_part_of_the_model(directory):
    write_manifest(directory, "org/tiny")
    digest = model_digest(directory)
    (directory / ".packed").mkdir()
    (directory / ".packed" / "0123.safetensors").write_bytes(WEIGHTS)
    verify_manifest(directory)
    write_manifest(directory, "org/tiny")
    assert model_digest(directory) == digest


def test_a_directory_without_a_manifest_does_not_verify(directory):
    with pytest.raises(ModelError, match=r"lacks manifest.json"):
        verify_manifest(directory)


@pytest.mark.parametrize(
    "content",
    [
        "not json",
        "[]",
        "{}",
        '{"format_version": 2, "source": "a", "files": {}}',
        '{"format_version": 1, "source": "a", "files": {"config.json": 3}}',
        '{"format_version": 1, "source": "a", "files": {"config.json": {"size_bytes": "1"}}}',
    ],
)
def test_a_malformed_manifest_is_refused(directory, content):
    (directory / MANIFEST_NAME).write_text(content)
    with pytest.raises(ModelError, match=r"manifest.json"):
        verify_manifest(directory)


def test_the_digest_is_short_stable_and_independent_of_the_place(directory, tmp_path_factory):
    write_manifest(directory, "org/tiny")
    copy = tmp_path_factory.mktemp("copy")
    for path in directory.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    digest = model_digest(directory)
    assert len(digest) == 16
    assert int(digest, 16) >= 0
    assert model_digest(copy) == digest


def test_the_digest_of_a_manifest_depends_on_content_and_not_on_the_source(directory):
    write_manifest(directory, "one")
    digest = model_digest(directory)
    write_manifest(directory, "two")
    assert model_digest(directory) == digest
    overwrite_last_byte(directory / "model.safetensors")
    write_manifest(directory, "two")
    assert model_digest(directory) != digest


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_without_a_manifest_a_longer_file_changes_the_digest(directory, name):
    digest = model_digest(directory)
    path = directory / name
    path.write_bytes(path.read_bytes() + b" ")
    assert model_digest(directory) != digest


def test_without_a_manifest_a_header_of_the_same_length_changes_the_digest(directory):
    digest = model_digest(directory)
    (directory / "model.safetensors").write_bytes(WEIGHTS.replace(b"U8", b"I8"))
    assert model_digest(directory) != digest


def test_without_a_manifest_only_headers_are_read(directory):
    """Weights are not hashed: that is the price of a quick start, and the docstring says so."""
    digest = model_digest(directory)
    overwrite_last_byte(directory / "model.safetensors")
    assert model_digest(directory) == digest


@pytest.mark.parametrize("num_bytes", [0, 5, 20])
def test_a_cut_off_header_has_no_digest(directory, num_bytes):
    (directory / "model.safetensors").write_bytes(WEIGHTS[:num_bytes])
    with pytest.raises(ModelError, match=r"model.safetensors is truncated"):
        model_digest(directory)


def test_an_absurd_header_length_is_refused_without_reading_it(directory):
    (directory / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ModelError, match=r"truncated or damaged"):
        model_digest(directory)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_digest_needs_the_files_it_covers(directory, name):
    (directory / name).unlink()
    with pytest.raises(ModelError, match=name):
        model_digest(directory)


def test_a_manifest_can_be_checked_without_torch():
    code = "import sys, afd_server.weights.manifest; sys.exit('torch' in sys.modules)"
    root = Path(manifest.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, timeout=60).returncode == 0
