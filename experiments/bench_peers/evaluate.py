"""KL of every assignment on text that no method saw; writes ``results.json`` and prints the table.

    python evaluate.py --model DIR --text FILE --out results.json ours_seed0.json auto-round_seed0.json ...

The last 30 % of the text is held out (``peers.py`` and ``ours.py`` draw from the first 60 %). All assignments
are applied with one quantizer, symmetric round-to-nearest in groups of 64, to one float32 model.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from autocomp.measure.device import device_name, software_versions
from autocomp.quantize.rounding import quantize
from autocomp.quantize.scheme import Scheme

HELD_OUT = 0.7
"""Where the held-out text begins, as a share of its characters."""


@dataclass(frozen=True)
class Row:
    """One assignment and its quality: mean KL in nats a token with its standard error over sequences."""

    method: str
    budget: str
    seed: int
    average_bits: float
    kl: float
    stderr: float
    cpu_seconds: float | None


class Evaluator:
    """The uncompressed model's log-probabilities on the held-out sequences, and a model to quantize."""

    def __init__(self, model: str, text: str, sequences: int, length: int, device: str) -> None:
        tokenizer = AutoTokenizer.from_pretrained(model)
        ids = tokenizer(text[int(len(text) * HELD_OUT) :], return_tensors="pt").input_ids[0]
        starts = torch.linspace(0, len(ids) - length - 1, sequences).long()
        self.tokens = torch.stack([ids[s : s + length] for s in starts.tolist()]).to(device)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(device).eval()
        self.originals = {n: m.weight.detach() for n, m in self.model.named_modules() if hasattr(m, "weight")}
        self.cache: dict[tuple[str, int], torch.Tensor] = {}
        with torch.inference_mode():
            self.teacher = [self._log_probs(t) for t in self.tokens]

    def _log_probs(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=tokens[None], use_cache=False).logits[0].log_softmax(-1)

    def _weight(self, name: str, bits: int) -> torch.Tensor:
        if (name, bits) not in self.cache:
            made = quantize(self.originals[name].cpu(), Scheme(bits, 64), method="rtn")
            self.cache[name, bits] = made.dequantize(torch.bfloat16).to(self.tokens.device)
        return self.cache[name, bits].float()

    def kl(self, bits: Mapping[str, int]) -> tuple[float, float]:
        """Mean KL(uncompressed || quantized) in nats a token, and its standard error over sequences."""
        for name, width in bits.items():
            self.model.get_submodule(name).weight.data = self._weight(name, width)
        rows = []
        with torch.inference_mode():
            for tokens, teacher in zip(self.tokens, self.teacher):
                ours = self._log_probs(tokens)
                rows.append(float((teacher.exp() * (teacher - ours)).sum(-1).mean()))
        return fmean(rows), stdev(rows) / math.sqrt(len(rows))


def assignments(path: Path) -> Iterator[tuple[str, str, int, Mapping[str, Any], float | None]]:
    """(method, budget, seed, answer, CPU seconds of the whole search) of each assignment in a file."""
    data = json.loads(path.read_text())
    if "methods" in data:
        for method, answers in data["methods"].items():
            score = data["phases"].get(f"score {'tied' if method.endswith('-tied') else 'linear'}", {})
            shared = score.get("cpu_seconds", 0.0) if method.startswith(("ilp", "hybrid")) else 0.0
            for budget, answer in answers.items():
                own = data["phases"][f"{method} {budget}"]["cpu_seconds"]
                yield method, budget, data["seed"], answer, own + shared
        return
    for budget, answer in data["budgets"].items():
        yield data["tool"], budget, data["seed"], answer, data["cpu_seconds"]


def table(rows: list[Row]) -> str:
    """Markdown: one line a method, mean KL over seeds a budget; the best of the others in bold."""
    budgets = sorted({r.budget for r in rows}, key=float)
    methods = list(dict.fromkeys(r.method for r in rows))
    lines = ["| method | " + " | ".join(budgets) + " | seeds | CPU s |", "|---" * (len(budgets) + 3) + "|"]
    for method in methods:
        mine = [r for r in rows if r.method == method]
        cells = []
        for budget in budgets:
            values = [r.kl for r in mine if r.budget == budget]
            spread = f" ± {stdev(values):.2g}" if len(values) > 1 and stdev(values) > 0 else ""
            cells.append(f"{fmean(values):.4g}{spread}" if values else "-")
        costs = [r.cpu_seconds for r in mine if r.cpu_seconds is not None]
        cost = f"{fmean(costs):.0f}" if costs else "-"
        lines.append(f"| {method} | " + " | ".join(cells) + f" | {len({r.seed for r in mine})} | {cost} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    judge = Evaluator(args.model, args.text.read_text(), args.sequences, args.length, args.device)
    rows: list[Row] = []
    known: dict[str, tuple[float, float]] = {}
    for path in args.files:
        for method, budget, seed, answer, cpu in assignments(path):
            key = json.dumps(answer["bits"], sort_keys=True)
            known[key] = known.get(key) or judge.kl(answer["bits"])
            mean, error = known[key]
            label = method if answer["average_bits"] <= float(budget) + 1e-6 else f"{method} (over)"
            rows.append(Row(label, f"{float(budget):g}", seed, answer["average_bits"], mean, error, cpu))
            print(f"{label} {budget} seed {seed}: {mean:.4f} ± {error:.4f}", flush=True)
    rows = [r for r in rows if r.method != "uniform" or r.average_bits == float(r.budget)]
    summary = {
        "command": "python evaluate.py " + " ".join(f.name for f in args.files),
        "sequences": args.sequences,
        "length": args.length,
        "machine": {"evaluation": device_name(args.device), "platform": platform.platform(terse=True)},
        "versions": dict(software_versions()),
        "rows": [asdict(r) for r in rows],
    }
    args.out.write_text(json.dumps(summary, indent=1))
    print(table(rows))


if __name__ == "__main__":
    main()
