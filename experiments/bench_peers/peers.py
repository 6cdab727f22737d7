"""Bit assignments of two other tools on one causal language model, on equal terms.

Run with an environment made from ``requirements-peers.txt``::

    python peers.py --model DIR --text FILE --tool modelopt-gradient --budgets 3.5,4 \
        --seed 0 --sequences 16 --length 256 --out FILE.json

Terms that hold for every tool:

* scope: the linear layers inside the decoder blocks; embeddings and the output head stay as
  they are and enter neither the search nor the budget;
* options: weight-only symmetric integers of 3, 4, 6 or 8 bits in groups of 64 input channels;
* budget: code bits (no scales) averaged over the weights in scope, an upper bound;
* calibration: the same token ids, drawn with a seed from the first part of a text file.

Scores are computed once and every budget is solved from them. Each tool keeps its own rounding
rule, loss and solver. Timings depend on the thread count: set ``OMP_NUM_THREADS``.

ModelOpt ties q/k/v and gate/up by default. AutoRound by default does not, so its JSON has a second
set of answers, ``tied_budgets``, solved from the same scores with the same ties.

The JSON holds, per budget, ``{"bits": {module: bits}, "average_bits": float, ...}`` and, in
seconds, ``cpu_seconds`` / ``wall_seconds`` (scoring plus the solves of ``budgets``, without
imports and model loading) with the parts under ``phases``. CPU seconds are user + system time
of this process and of its finished children.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import random
import re
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

OPTIONS: tuple[int, ...] = (3, 4, 6, 8)
"""Weight bits a layer may get."""

GROUP_SIZE = 64
"""Input channels that share one scale."""

TIED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of one block that serving engines fuse, hence one format for each tuple."""

TOOLS = ("modelopt-gradient", "modelopt-kl", "auto-round")

Bits = dict[str, int]


@dataclass
class Stopwatch:
    """CPU and wall seconds by phase name."""

    phases: dict[str, dict[str, float]] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the body of the ``with`` statement and add it to ``name``."""
        cpu, wall = cpu_seconds(), time.perf_counter()
        try:
            yield
        finally:
            entry = self.phases.setdefault(name, {"cpu_seconds": 0.0, "wall_seconds": 0.0})
            entry["cpu_seconds"] += cpu_seconds() - cpu
            entry["wall_seconds"] += time.perf_counter() - wall

    def total(self, unit: str, prefixes: tuple[str, ...] = ("score", "solve")) -> float:
        """Sum of ``unit`` (seconds) over the phases whose names start with a prefix."""
        return sum(v[unit] for k, v in self.phases.items() if k.startswith(prefixes))


def cpu_seconds() -> float:
    """User + system seconds of this process and of its children that have finished."""
    usages = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usages)


@dataclass
class Calibration:
    """Equal-length sequences: raw text snippets and their first tokens."""

    snippets: list[str]
    tokens: torch.Tensor
    """Token ids, int64, (sequences, length)."""

    def describe(self) -> dict[str, Any]:
        """Sizes in tokens and a hash of the token ids."""
        raw = self.tokens.numpy().tobytes()
        return {
            "sequences": self.tokens.shape[0],
            "length": self.tokens.shape[1],
            "tokens": self.tokens.numel(),
            "sha256": hashlib.sha256(raw).hexdigest(),
        }


def draw_calibration(
    text: str, tokenizer: Any, seed: int, sequences: int, length: int, fraction: float = 0.6
) -> Calibration:
    """Draw ``sequences`` snippets of ``length`` tokens from the first ``fraction`` of ``text``.

    The part is cut into as many equal spans as sequences and one start is drawn in each, at the
    beginning of a line, so that snippets seldom overlap. A tool that reads text and tokenises it
    again gets the same ids, because ids are the first ones of the snippet.
    """
    part = text[: int(len(text) * fraction)]
    snippet_chars = 10 * length
    last_start = len(part) - snippet_chars
    if last_start <= 0:
        raise ValueError(f"need more than {snippet_chars} calibration characters, got {len(part)}")
    rng = random.Random(seed)
    snippets, rows = [], []
    for index in range(sequences):
        low, high = (last_start * i // sequences for i in (index, index + 1))
        snippet = _draw_snippet(part, rng, low, high, snippet_chars)
        ids = tokenizer(snippet, truncation=True, max_length=length)["input_ids"]
        if len(ids) < length:
            raise ValueError(f"snippet {index} has only {len(ids)} of {length} tokens")
        snippets.append(snippet)
        rows.append(ids)
    return Calibration(snippets, torch.tensor(rows, dtype=torch.long))


def _draw_snippet(part: str, rng: random.Random, low: int, high: int, chars: int) -> str:
    """``chars`` characters from the first line that starts after a random place in [low, high)."""
    start = rng.randrange(low, max(high, low + 1))
    line = part.find("\n", start)
    start = start if line < 0 else min(line, len(part) - chars)
    return part[start : start + chars].strip()


def layers_in_scope(model: nn.Module) -> dict[str, int]:
    """Number of weights of every linear layer inside a decoder block, by module name."""
    block = re.compile(r"(^|\.)layers\.\d+\.")
    return {
        name: module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and block.search(name)
    }


def average_bits(bits: Bits, scope: dict[str, int]) -> float:
    """Code bits per weight over the layers in ``scope`` (weights per layer); no scales."""
    missing = set(scope) ^ set(bits)
    if missing:
        raise ValueError(f"assignment and scope differ in {sorted(missing)[:5]}")
    return sum(bits[n] * scope[n] for n in scope) / sum(scope.values())


# --------------------------------------------------------------------------- ModelOpt


def modelopt_format(bits: int) -> dict[str, Any]:
    """Weight-only symmetric integer format with ``bits`` bits in groups of ``GROUP_SIZE``."""
    weight = {"num_bits": bits, "block_sizes": {-1: GROUP_SIZE}, "enable": True}
    return {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*weight_quantizer", "cfg": weight},
        ],
        "algorithm": "max",
    }


def modelopt_scores(
    model: nn.Module, calibration: Calibration, method: str, budget: float, scope: dict[str, int]
) -> dict[str, Any]:
    """Search state of ``auto_quantize`` (scores and costs of all groups and formats).

    One calibration step is enough: weight ranges do not depend on data. Linear layers out of
    scope are disabled and cost nothing. The ILP of ``gradient`` may not leave a layer
    unquantised. The threshold rule of ``kl_div`` must be able to: when even 8 bits exceed its
    threshold it takes the last format, no quantisation, and without that format it would take
    the first one, 3 bits, for the most sensitive layers (see ``modelopt_solve``).
    """
    import modelopt.torch.quantization as mtq

    formats = [modelopt_format(b) for b in OPTIONS]
    others = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in scope]
    batches = [{"input_ids": row[None], "labels": row[None]} for row in calibration.tokens]
    gradient = method == "gradient"

    def forward_step(net: nn.Module, batch: dict[str, torch.Tensor]) -> Any:
        output = net(**batch, use_cache=False) if gradient else net(batch["input_ids"])
        return output if gradient else output.logits

    _, state = mtq.auto_quantize(
        model,
        constraints={
            "effective_bits": budget,
            "cost": {"excluded_module_name_patterns": others},
        },
        quantization_formats=formats,
        module_search_spaces=[
            {
                "module_name_patterns": list(scope),
                "quantization_formats": formats,
                "allow_no_quant": not gradient,
            }
        ],
        data_loader=batches,
        forward_step=forward_step,
        loss_func=(lambda output, batch: output.loss) if gradient else None,
        disabled_layers=others,
        num_calib_steps=1,
        num_score_steps=len(batches),
        method=method,
        verbose=False,
    )
    return state


def modelopt_solve(state: dict[str, Any], target: float, scope: dict[str, int]) -> Bits:
    """Bits per module for ``target`` average bits, from stored scores.

    Layers left unquantised get the widest option instead.
    """
    import modelopt.torch.quantization as mtq

    config = mtq.get_auto_quantize_config(state, {"effective_bits": target})
    suffix = ".weight_quantizer"
    bits = {
        entry["quantizer_name"].removesuffix(suffix): int(entry["cfg"]["num_bits"])
        for entry in config["quant_cfg"]
        if entry["quantizer_name"].endswith(suffix) and entry.get("cfg")
    }
    return dict.fromkeys(scope, max(OPTIONS)) | bits


def run_modelopt(
    model: nn.Module,
    calibration: Calibration,
    scope: dict[str, int],
    budgets: list[float],
    watch: Stopwatch,
    method: str,
) -> tuple[dict[float, Bits], dict[str, Any]]:
    """Assignments by budget and facts on the search, for ``method`` gradient or kl_div."""
    with watch.phase("score"):
        state = modelopt_scores(model, calibration, method, max(budgets), scope)
    answers: dict[float, Bits] = {}
    targets: dict[str, float] = {}
    for budget in budgets:
        with watch.phase(f"solve {budget:g}"):
            answers[budget], targets[f"{budget:g}"] = within_budget(
                lambda target: modelopt_solve(state, target, scope), budget, scope
            )
    stats = [s for s in state["candidate_stats"].values() if len(s["formats"]) > 1]
    table = {
        "+".join(s["module_names"]): dict(zip(map(str, s["formats"]), map(float, s["scores"]))) for s in stats
    }
    return answers, {
        "groups": len(stats),
        "denominator_weights": float(state["cost_denominator"]),
        "targets_given": targets,
        "scores": table,
    }


def within_budget(
    solve: Callable[[float], Bits], budget: float, scope: dict[str, int], step: float = 0.002
) -> tuple[Bits, float]:
    """Fullest answer of ``solve`` that keeps to ``budget`` (bits), and the target that gave it.

    The answer may be off its target: below, where 8 bits replace no quantisation, or above, as
    the threshold search of ``kl_div`` keeps its last probe, feasible or not. So the target is
    raised by bisection (to ``step`` bits) if the answer leaves room, else lowered until it fits.
    """
    best = None
    low, high = budget, budget
    bits = solve(budget)
    if average_bits(bits, scope) < budget - step:
        high = 2.0 * budget
    if average_bits(bits, scope) <= budget + 1e-9:
        best = (bits, budget)
    while high - low > step:
        target = (low + high) / 2
        bits = solve(target)
        if average_bits(bits, scope) <= budget + 1e-9:
            if best is None or average_bits(bits, scope) > average_bits(best[0], scope):
                best = (bits, target)
            low = target
        else:
            high = target
    target = budget
    while best is None and target > min(OPTIONS):
        target -= step
        bits = solve(target)
        if average_bits(bits, scope) <= budget + 1e-9:
            best = (bits, target)
    if best is None:
        raise RuntimeError(f"no answer within {budget} bits")
    return best


# --------------------------------------------------------------------------- AutoRound


def run_auto_round(
    model: nn.Module,
    calibration: Calibration,
    scope: dict[str, int],
    budgets: list[float],
    watch: Stopwatch,
    tokenizer: Any,
) -> tuple[dict[float, Bits], dict[str, Any]]:
    """Assignments by budget (bits), and the assignments with tied layers among the facts.

    Phase "score" holds the scoring of all options and one solve; later solves read the scores
    from a cache in a temporary folder, which starts empty.
    """
    with tempfile.TemporaryDirectory() as folder:
        os.environ["AR_AUTO_SCHEME_CACHE"] = str(Path(folder) / "cache")
        dataset = Path(folder) / "calibration.jsonl"
        lines = [json.dumps({"text": snippet}) for snippet in calibration.snippets]
        dataset.write_text("\n".join(lines) + "\n", encoding="utf-8")
        _check_same_tokens(str(dataset), calibration, tokenizer)

        def solve(target: float, tied: bool) -> Bits:
            return _auto_scheme(model, str(dataset), calibration, scope, target, tokenizer, tied)

        with watch.phase("score"):
            solve(budgets[0], tied=False)
        answers: dict[bool, dict[float, Bits]] = {False: {}, True: {}}
        for tied, found in answers.items():
            for budget in budgets:
                with watch.phase(f"{'tied ' if tied else ''}solve {budget:g}"):
                    found[budget] = solve(budget, tied)
    return answers[False], {"tied_budgets": answers[True]}


def _check_same_tokens(dataset: str, calibration: Calibration, tokenizer: Any) -> None:
    """Fail unless AutoRound's own loader yields exactly the calibration tokens, in any order."""
    from auto_round.calib_dataset import get_dataloader

    count, length = calibration.tokens.shape
    loader = get_dataloader(tokenizer, length, dataset_name=dataset, seed=42, bs=8, nsamples=count)
    rows = [tuple(row) for batch in loader for row in batch["input_ids"].tolist()]
    if sorted(rows) != sorted(tuple(row) for row in calibration.tokens.tolist()):
        raise RuntimeError("AutoRound would calibrate on other tokens than drawn")


def _auto_scheme(
    model: nn.Module,
    dataset: str,
    calibration: Calibration,
    scope: dict[str, int],
    target: float,
    tokenizer: Any,
    tied: bool,
) -> Bits:
    """Bits per module chosen by AutoScheme for ``target`` average code bits."""
    from auto_round import AutoScheme
    from auto_round.auto_scheme.gen_auto_scheme import GenScheme
    from auto_round.schemes import QuantizationScheme

    options = [
        QuantizationScheme(bits=b, group_size=GROUP_SIZE, sym=True, data_type="int", act_bits=16)
        for b in OPTIONS
    ]
    count, length = calibration.tokens.shape
    scheme = AutoScheme(
        avg_bits=target,
        options=options,
        shared_layers=[list(group) for group in TIED] if tied else None,
        ignore_scale_zp_bits=True,
        nsamples=count,
        seqlen=length,
        low_cpu_mem_usage=False,
    )
    generator = GenScheme(
        scheme,
        model,
        list(scope),
        {},
        dataset=dataset,
        device_map="cpu",
        tokenizer=tokenizer,
        enable_torch_compile=False,
    )
    config = generator.get_layer_config()
    return {name: int(config[name]["bits"]) for name in scope}


# --------------------------------------------------------------------------- command line


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="folder with weights and tokenizer")
    parser.add_argument("--text", required=True, help="UTF-8 text file")
    parser.add_argument("--fraction", type=float, default=0.6, help="leading part of the text used")
    parser.add_argument("--tool", required=True, choices=TOOLS)
    parser.add_argument("--budgets", default="3.5,4,4.5,5,6", help="average bits, by commas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--out", required=True, help="JSON file to write")
    return parser.parse_args(argv)


def run_tool(
    args: argparse.Namespace,
    model: nn.Module,
    tokenizer: Any,
    calibration: Calibration,
    watch: Stopwatch,
) -> tuple[str, dict[float, Bits], dict[str, Any]]:
    """Package name, assignments by budget (bits) and facts on the search."""
    scope = layers_in_scope(model)
    budgets = [float(b) for b in args.budgets.split(",")]
    if args.tool == "auto-round":
        found = run_auto_round(model, calibration, scope, budgets, watch, tokenizer)
        return "auto-round", *found
    method = {"modelopt-gradient": "gradient", "modelopt-kl": "kl_div"}[args.tool]
    return "nvidia-modelopt", *run_modelopt(model, calibration, scope, budgets, watch, method)


def report_budget(budget: float, bits: Bits, scope: dict[str, int]) -> dict[str, Any]:
    """One budget of the result: assignment, average bits, unused bits per weight."""
    average = average_bits(bits, scope)
    if average > budget + 1e-9:
        raise RuntimeError(f"{average} average bits exceed the budget of {budget}")
    return {"bits": bits, "average_bits": average, "unused_bits": budget - average}


def main(argv: list[str] | None = None) -> None:
    """Run one tool and write its JSON."""
    args = parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    watch = Stopwatch()
    with watch.phase("load"):
        torch.manual_seed(args.seed)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
        text = Path(args.text).read_text(encoding="utf-8")
        calibration = draw_calibration(text, tokenizer, args.seed, args.sequences, args.length, args.fraction)
    scope = layers_in_scope(model)
    package, answers, facts = run_tool(args, model, tokenizer, calibration, watch)
    tied_answers = facts.pop("tied_budgets", {})
    result = {
        "tool": args.tool,
        "version": f"{package} {importlib.metadata.version(package)}",
        "seed": args.seed,
        "options_bits": OPTIONS,
        "group_size": GROUP_SIZE,
        "threads": torch.get_num_threads(),
        "calibration": calibration.describe(),
        "scope": {"layers": len(scope), "weights": sum(scope.values())},
        "budgets": {f"{b:g}": report_budget(b, bits, scope) for b, bits in answers.items()},
        "tied_budgets": {f"{b:g}": report_budget(b, bits, scope) for b, bits in tied_answers.items()},
        "cpu_seconds": watch.total("cpu_seconds"),
        "wall_seconds": watch.total("wall_seconds"),
        "phases": watch.phases,
        "process_cpu_seconds": cpu_seconds(),
        "facts": facts,
    }
    Path(args.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
