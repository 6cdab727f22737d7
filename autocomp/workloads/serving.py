"""Latency of a causal language model in its deployment scenario: prefill, decode, peak memory."""

from __future__ import annotations

import contextlib
import copy
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autocomp.attention.cache import SpanCache, new_cache
from autocomp.errors import CapabilityError
from autocomp.measure.device import conditions, set_threads
from autocomp.measure.memory import peak_memory, weights_bytes
from autocomp.measure.timing import Timing, time_calls
from autocomp.trial import Estimate
from autocomp.workloads.checkpoint import quiet
from autocomp.workloads.discovery import unique_bytes

if TYPE_CHECKING:
    from autocomp.serving import LeanDecoder

WARMUP = 2


@contextlib.contextmanager
def cpu_threads(count: int) -> Iterator[int]:
    """Run with ``count`` threads of torch (0: as many as it has now); yields the number in force."""
    former = set_threads(count)
    try:
        yield torch.get_num_threads()
    finally:
        set_threads(former)


class Server:
    """Prefill and decode of one model on fixed tokens, as callables to time.

    Args:
        model: in its serving state.
        tokens: ``[batch, >= max(prompt, context) + steps]``; values matter to mixtures of experts only.
        prompt: tokens of a prefill.
        context: tokens in the key/value cache when decoding starts.
        steps: decode steps that one call of ``decode`` makes.
        decoder: what decodes after a prefill by the model; ``None`` for the model's own eager loop, whose
            Python overhead hides the weights of a small model.
    """

    def __init__(
        self, model: Any, tokens: Tensor, *, prompt: int, context: int, steps: int,
        decoder: LeanDecoder | None = None,
    ) -> None:  # fmt: skip
        self.model = model
        self.decoder = decoder
        self.prompt = tokens[:, :prompt].contiguous()
        self.context = tokens[:, :context].contiguous()
        self.steps = [tokens[:, context + i : context + i + 1].contiguous() for i in range(steps)]
        accepted = inspect.signature(model.forward).parameters
        #: Serving needs the logits of the last position; the others are skipped where the model can.
        self.last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._cache: Any = None
        self._can_crop = False

    def prefill(self) -> Any:
        """One pass over the prompt into a fresh cache, which is returned."""
        return self._fill(self.prompt)

    def prepare_decode(self) -> None:
        """Fill the cache with the context and find out how to rewind it.

        Raises:
            CapabilityError: the model keeps no cache.
        """
        self._cache = self._fill(self.context)
        if self._cache is None:
            name = type(self.model).__name__
            raise CapabilityError(f"{name} returns no key/value cache: decode_ms can't be measured for it")
        if self.decoder is not None:
            self.decoder.load_cache(self._cache, self.context.shape[1])
            return
        trial = copy.deepcopy(self._cache)
        self._can_crop = self._run_steps(trial) and self._rewind(trial)

    def cache_bytes(self) -> int:
        """Bytes of the tensors that hold keys and values; after ``prepare_decode``."""
        if self.decoder is not None:
            return self.decoder.cache_bytes
        if isinstance(self._cache, SpanCache):
            return self._cache.nbytes
        return unique_bytes(
            t for layer in getattr(self._cache, "layers", ())
            for t in (getattr(layer, "keys", None), getattr(layer, "values", None))
            if isinstance(t, Tensor)
        )  # fmt: skip

    @property
    def runtime(self) -> str:
        """``lean`` or ``eager``: what decodes."""
        return "eager" if self.decoder is None else "lean"

    @property
    def rewinding(self) -> str:
        """``position`` (the lean decoder's own, free), ``crop`` (views or positions, free) or ``copy``: the
        cache is cloned inside the timed call, where cropping is impossible (recurrent states)."""
        if self.decoder is not None:
            return "position"
        return "crop" if self._can_crop else "copy"

    def decode(self) -> None:
        """All decode steps from a cache of ``context`` tokens, which is rewound."""
        if self.decoder is not None:
            for token in self.steps:
                self.decoder.step(token[:, 0])
            self.decoder.rewind(self.context.shape[1], exact=False)
        elif self._can_crop:
            self._run_steps(self._cache)
            self._rewind(self._cache)
        else:
            self._run_steps(copy.deepcopy(self._cache))

    def generate(self) -> None:
        """The same number of tokens through ``model.generate``, for comparison."""
        ids = torch.cat([self.context, self.steps[0]], dim=1)
        count = len(self.steps)
        self.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=copy.deepcopy(self._cache),
            min_new_tokens=count, max_new_tokens=count, do_sample=False, use_cache=True,
        )  # fmt: skip

    def _fill(self, tokens: Tensor) -> Any:
        # The model makes the cache that suits it: dynamic, sliding, recurrent; a plan needs one of ours.
        cache = new_cache(self.model)
        given = {} if cache is None else {"past_key_values": cache}
        return self.model(input_ids=tokens, use_cache=True, **given, **self.last_only).past_key_values

    def _run_steps(self, cache: Any) -> bool:
        for token in self.steps:
            self.model(input_ids=token, past_key_values=cache, use_cache=True)
        return True

    def _rewind(self, cache: Any) -> bool:
        """Cut ``cache`` back to the context; False when it can't be."""
        length = self.context.shape[1]
        if isinstance(cache, SpanCache):
            cache.rewind(length)
            return True
        try:
            # A negative count means "remove this many" in every version of transformers 5.
            cache.crop(length - cache.get_seq_length())
        except (RuntimeError, ValueError, AttributeError, NotImplementedError):
            return False
        return bool(cache.get_seq_length() == length)


def measure(
    server: Server, *, repeats: int, threads: int, device: str, seconds: float = 0.0, generate: bool = True
) -> tuple[dict[str, Estimate], dict[str, Any]]:
    """Time ``server``: ``prefill_ms`` (one prompt batch), ``decode_ms`` (one token of every sequence in the
    batch), ``resident_mb`` (10**6 bytes of weights as the kernels hold them), ``cache_mb`` (10**6 bytes of
    keys and values that are allocated when decoding starts) and ``peak_mb`` (the weights plus the largest
    working memory while serving, caches and activations included), with details for the record.

    With ``generate``, the details hold ``generate_ms`` too: a token through ``model.generate``, whose Python
    overhead hides the weights of a small model; ``None`` where it fails.
    """
    steps = len(server.steps)

    def per_token(call: Callable[[], None], count: int, least: float = 0.0) -> Timing:
        return time_calls(call, warmup=1, repeats=count, device=device, calls=steps, min_seconds=least)

    with cpu_threads(threads) as in_force, torch.inference_mode():
        record = conditions(device, in_force)
        with peak_memory(device) as peak:
            prefill = time_calls(server.prefill, warmup=WARMUP, repeats=repeats, device=device)
            server.prepare_decode()
            cache_bytes = server.cache_bytes()
            decode = per_token(server.decode, repeats, seconds)
        if generate:
            generate_ms, reason = _try_generate(lambda: per_token(server.generate, min(3, repeats)))
    resident = weights_bytes(server.model)
    buffers = 0 if server.decoder is None else server.decoder.nbytes
    metrics = {
        "prefill_ms": Estimate(prefill.median_ms, prefill.stderr_ms, prefill.n),
        "decode_ms": Estimate(decode.median_ms, decode.stderr_ms, decode.n),
        "resident_mb": Estimate(resident / 1e6),
        "cache_mb": Estimate(cache_bytes / 1e6),
        "peak_mb": Estimate((resident + buffers + peak.increase_bytes) / 1e6),
    }
    details: dict[str, Any] = {
        "prefill": {"iqr_ms": prefill.iqr_ms, "n": prefill.n, "dropped": prefill.dropped},
        "decode": {
            "iqr_ms": decode.iqr_ms, "n": decode.n, "dropped": decode.dropped,
            "steps": steps, "rewind": server.rewinding, "runtime": server.runtime,
        },
        "conditions": record, "threads": in_force, "load": record["load"],
        "prefill_logits": "last" if server.last_only else "all", "peak_memory": peak.method,
    }  # fmt: skip
    if generate:
        details |= {"generate_ms": generate_ms} | ({"generate_error": reason} if reason else {})
    return metrics, details


def _try_generate(timed: Callable[[], Timing]) -> tuple[float | None, str]:
    """Milliseconds a token of ``generate``, or ``None`` and why: a comparison must not fail a measurement."""
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on sampling flags of the generation configuration
            return timed().median_ms, ""
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, NotImplementedError) as error:
        return None, f"{type(error).__name__}: {error}"
