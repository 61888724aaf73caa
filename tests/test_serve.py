"""What is chosen from the settings before anything starts, and what is said about it."""

import pytest

from afd_server import serve
from afd_server.config import ServeConfig
from afd_server.core.errors import ConfigError
from afd_server.core.model_spec import read_model_spec
from afd_server.serve import _resolve_numerics
from afd_server.workers.config import Numerics
from support.checkpoints import tiny_llama
from support.families import family


@pytest.fixture
def libraries(tmp_path, monkeypatch):
    """Where the native kernels would be; there are none."""
    monkeypatch.setattr(serve, "NATIVE_LIBRARIES", tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def llama():
    return read_model_spec(tiny_llama()[0])


@pytest.mark.parametrize("quantization", ["auto", "none"])
def test_a_server_without_native_kernels_says_what_is_missing(
    libraries, caplog, llama, quantization
):
    config = ServeConfig(model="m", quantization=quantization, compute_threads=2)
    assert _resolve_numerics(config, llama) == Numerics("reference", "float32", "float32")
    assert [r.levelname for r in caplog.records] == ["WARNING"], "threads are of use to torch"
    assert f"no native kernels in {libraries}" in caplog.text
    assert "install g++ and reinstall" in caplog.text


def test_int8_without_native_kernels_is_refused(libraries, llama):
    with pytest.raises(ConfigError, match=r"needs the native kernels.*install g\+\+"):
        _resolve_numerics(ServeConfig(model="m", quantization="int8"), llama)


@pytest.mark.parametrize("quantization", ["auto", "none"])
@pytest.mark.parametrize("threads", [1, 4])
def test_threads_beside_native_kernels_are_warned_of(
    libraries, caplog, llama, quantization, threads
):
    (libraries / "libafd_portable.so").touch()
    config = ServeConfig(model="m", quantization=quantization, compute_threads=threads)
    assert _resolve_numerics(config, llama).kernels == "native"
    warned = "compute_threads is 4, but native kernels start no thread"
    assert [warned in record.getMessage() for record in caplog.records] == [True] * (threads > 1)


@pytest.mark.parametrize(
    ("name", "options", "kv"),
    [
        ("llama", {}, "int8"),
        ("llama", {"quantization": "none"}, "float32"),
        ("llama", {"dtype": "bfloat16"}, "bfloat16"),
        ("llama", {"kv_cache_dtype": "bfloat16"}, "bfloat16"),
        ("deepseek_v3", {}, "bfloat16"),
        ("deepseek_v3", {"kv_cache_dtype": "int8"}, "int8"),
    ],
)
def test_keys_and_values_are_int8_with_int8_products_unless_heads_share_a_latent_vector(
    libraries, llama, name, options, kv
):
    (libraries / "libafd_portable.so").touch()
    model = llama if name == "llama" else read_model_spec(family(name).directory)
    assert _resolve_numerics(ServeConfig(model="m", **options), model).kv == kv
