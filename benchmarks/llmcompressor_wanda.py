"""Prune a model folder with llm-compressor's Wanda on given token ids, and time it: a baseline for mlprune.

    python benchmarks/llmcompressor_wanda.py MODEL_DIR IDS.safetensors|IDS.npz --sparsity 0.5 [--threads N]

It runs on the CPU, in an environment of its own, because mlprune neither imports nor needs llm-compressor:

    python -m venv ENV && ENV/bin/pip install torch==2.13.0 && ENV/bin/pip install llmcompressor==0.14.0.1

For the same reason no test runs it and mypy does not check it; `sweep_cost.py --llmcompressor ENV/bin/python`
runs it.

IDS holds `input_ids`, int64 [samples, length]; every row is full. The last line on stdout is JSON. `seconds` is
the duration of the one `oneshot` call: it traces the model, then calibrates, prunes and propagates each decoder
layer, and saves nothing. `load_seconds` is the duration of reading the model and the tokenizer. Importing the
libraries and reading IDS are not timed.

It departs from llm-compressor's defaults in two ways. The ids come as a ready DataLoader, in the order of the
file, so nothing is tokenised or shuffled. `lm_head` stays dense. The rest is llm-compressor's Wanda: the
sequential pipeline, one decoder layer at a time on the outputs of the pruned layers before it; eager attention,
which llm-compressor forces; and the `0:0` mask, int(columns * sparsity) weights of each row. The batch size is
its default of 1: no larger batch was clearly faster on two cores (`--batch-size` to try).
"""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import time
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # llm-compressor moves to an accelerator where it sees one
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import WandaPruningModifier
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer


def read_ids(path: Path) -> torch.Tensor:
    """`input_ids` of a .safetensors or .npz file, int64 [samples, length]."""
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            ids = torch.from_numpy(arrays["input_ids"])
    else:
        ids = load_file(path)["input_ids"]
    if ids.dtype != torch.int64 or ids.ndim != 2:
        raise SystemExit(f"{path}: input_ids is {ids.dtype} {list(ids.shape)}, not int64 [samples, length]")
    return ids


def sparsity_of(model: torch.nn.Module) -> float:
    """The share of zeros in the weights of every Linear but lm_head."""
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    weights = [m.weight for n, m in linears.items() if not n.endswith("lm_head")]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("ids", type=Path)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--threads", type=int, help="torch's threads (default: torch's own choice)")
    parser.add_argument("--batch-size", type=int, default=1, help="sequences a forward pass")
    args = parser.parse_args()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    ids = read_ids(args.ids)

    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(args.model)  # oneshot would load one itself otherwise
    load_seconds = time.perf_counter() - start

    batches = DataLoader([{"input_ids": row} for row in ids], batch_size=args.batch_size)
    # a plain "lm_head" would miss: the names that Wanda matches end in a dot
    recipe = WandaPruningModifier(
        sparsity=args.sparsity, mask_structure="0:0", targets=["Linear"], ignore=["re:.*lm_head"]
    )
    start = time.perf_counter()
    oneshot(model=model, processor=tokenizer, dataset=batches, recipe=recipe)
    seconds = time.perf_counter() - start

    names = ("llmcompressor", "compressed-tensors", "transformers", "torch")
    result = {
        "seconds": round(seconds, 3),
        "load_seconds": round(load_seconds, 3),
        "sparsity_actual": round(sparsity_of(model), 6),
        "versions": {"python": platform.python_version()} | {n: importlib.metadata.version(n) for n in names},
        "threads": torch.get_num_threads(),
        "batch_size": args.batch_size,
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
