"""What quantisation costs: perplexity of the demo model in each numerics, against float32.

Each text gives windows of tokens, one after the other; the model predicts every token of a window
from those before it.

    python benchmarks/accuracy/perplexity.py LICENSE docs/architecture.md --output result.json
"""

import argparse
import json
import math
from datetime import UTC, datetime
from pathlib import Path

import torch
from tokenizers import Tokenizer

from afd_server.config import ServeConfig
from afd_server.core.model_spec import ModelSpec, read_model_spec
from afd_server.kernels.reference import PagedRun, plan_paged_rows
from afd_server.loadgen.environment import environment
from afd_server.models.base import FFNShare, MicroBatch
from afd_server.models.catalogue import ARCHITECTURES
from afd_server.models.head import Held
from afd_server.models.monolith import run_monolith
from afd_server.weights.checkpoint import Checkpoint
from afd_server.weights.packed import PackedWeights
from afd_server.weights.pull import resolve
from afd_server.workers.attention.kv_store import KVStore
from afd_server.workers.config import Numerics
from afd_server.workers.runtime import select_kernels
from afd_server.workers.tensors import TORCH_DTYPES, row_dtype

EXACT = Numerics("native", "float32", "float32")
OTHERS = {
    "int8, bfloat16 KV": Numerics("native", "int8", "bfloat16"),
    "int8, int8 KV": Numerics("native", "int8", "int8"),
    "float32, int8 KV": Numerics("native", "float32", "int8"),
    "int8, float32 KV": Numerics("native", "int8", "float32"),
    "bfloat16 weights and KV": Numerics("native", "bfloat16", "bfloat16"),
}
CHUNK, BLOCK = 256, 16


class Scorer:
    """The model in one numerics."""

    def __init__(self, directory: Path, spec: ModelSpec, numerics: Numerics, num_tokens: int):
        kernels = select_kernels(numerics)
        weights = PackedWeights(Checkpoint(directory, row_dtype(numerics)), kernels, None)
        architecture = ARCHITECTURES[spec.model_type]
        self._attention = architecture.attention(spec, weights, kernels, num_tokens)
        self._held = [Held(architecture, spec, weights, kernels, FFNShare())]
        self._kv = KVStore(spec, -(-num_tokens // BLOCK), BLOCK, TORCH_DTYPES[numerics.kv])

    def perplexity(self, ids: list[int]) -> float:
        """Return exp of the mean negative log-likelihood of ids[1:]."""
        table, total = list(range(-(-len(ids) // BLOCK))), 0.0
        for start in range(0, len(ids), CHUNK):
            chunk = torch.tensor(ids[start : start + CHUNK])
            positions = torch.arange(start, start + len(chunk))
            batch = MicroBatch(
                token_ids=chunk,
                positions=positions,
                slots=positions,
                rows=plan_paged_rows([PagedRun(start, len(chunk), table)]),
                logit_rows=torch.arange(len(chunk)),
                kv=self._kv.layers,
            )
            scores = run_monolith(self._attention, self._held, batch).log_softmax(-1)
            targets = torch.tensor(ids[start + 1 : start + 1 + CHUNK])
            total -= scores[: len(targets)].gather(1, targets[:, None]).sum().item()
        return math.exp(total / (len(ids) - 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--tokens", type=int, default=1024, help="of a window")
    parser.add_argument("--windows", type=int, default=1, help="at most so many of each text")
    parser.add_argument("--skip", type=int, default=0, help="tokens at the beginning of each text")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    directory = resolve(options.model, ServeConfig().cache_directory)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    spec = read_model_spec(directory)
    windows = {}
    for path in options.texts:
        ids = tokenizer.encode(path.read_text("utf-8")).ids[options.skip :]
        count = min(options.windows, len(ids) // options.tokens)
        if count == 0:
            parser.error(f"{path} has {len(ids)} tokens, wanted {options.tokens}")
        for start in range(0, count * options.tokens, options.tokens):
            windows[f"{path.name} {options.skip + start}"] = ids[start : start + options.tokens]
    scores = {
        name: {text: scorer.perplexity(ids) for text, ids in windows.items()}
        for name, numerics in {"float32": EXACT, **OTHERS}.items()
        for scorer in [Scorer(directory, spec, numerics, options.tokens)]
    }
    exact = scores["float32"]
    for name, by_text in scores.items():
        print(name, *(f"{t} {p:.3f} ({p / exact[t] - 1:+.2%})" for t, p in by_text.items()))
    if options.output:
        result = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "environment": environment(),
            "tokens": options.tokens,
            "skipped": options.skip,
            "perplexity": scores,
        }
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
