"""Train a byte-level Llama of four layers on the docstrings of Python's standard library.

Small enough that all 4,096 configurations of ``table.yaml`` are measured in an hour on two cores, and
trained, so that layers differ in what their bits cost. The text that searches measure on
(``pydoc_data.topics``) is not among what it was trained on.
"""

from __future__ import annotations

import argparse
import ast
import json
import sysconfig
import time
import warnings
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from autocomp.testing.models import tiny_tokenizer

CONTEXT = 256


def corpus() -> torch.Tensor:
    """Docstrings, int64 ``[bytes]`` of token numbers."""
    root, found = Path(sysconfig.get_path("stdlib")), []
    for path in sorted(root.rglob("*.py")):
        if {"site-packages", "test", "tests", "pydoc_data", "idlelib"} & set(path.parts):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                tree = ast.parse(path.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError):
                continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        found += [text for text in texts if text]
    return torch.tensor(tiny_tokenizer()("\n\n".join(found))["input_ids"])


def build() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
            tie_word_embeddings=True, bos_token_id=256, eos_token_id=256, pad_token_id=257,
        )
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "model")
    args = parser.parse_args()
    torch.manual_seed(0)
    ids, model = corpus(), build().train()
    print(f"{len(ids) / 1e6:.2f} MB of text; {model.num_parameters() / 1e6:.2f} M parameters", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=args.steps, pct_start=0.1)
    started, losses = time.time(), []
    for step in range(1, args.steps + 1):
        starts = torch.randint(len(ids) - CONTEXT, (args.batch,))
        rows = torch.stack([ids[s : s + CONTEXT] for s in starts.tolist()])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        plan.step()
        losses.append(loss.item())
        if step % 100 == 0:
            mean = sum(losses[-100:]) / 100
            print(f"step {step}: loss {mean:.3f} nats a byte, {time.time() - started:.0f} s", flush=True)
    model.eval().bfloat16().save_pretrained(args.out)
    tiny_tokenizer().save_pretrained(args.out)
    record = {"steps": args.steps, "batch": args.batch, "bytes": len(ids), "loss": sum(losses[-100:]) / 100}
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
