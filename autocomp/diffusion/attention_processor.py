"""The attention processor that follows a ``LayerPlan``; each step's kernel calls are made ready once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from autocomp.diffusion.attention_forms import FORMS, Form, Inputs, Output, tensors_of
from autocomp.diffusion.attention_plan import Action, LayerPlan, next_slots
from autocomp.diffusion.state import SamplingState
from autocomp.errors import CapabilityError, SpaceError
from autocomp.kernels.attention import attention_window_residual
from autocomp.kernels.attention_diffusion_reference import FULL, FULL_SAVE, REUSE, WINDOW_ADD

Tensor = torch.Tensor
Slots = Sequence[Sequence[int | None]]


@dataclass(frozen=True)
class _Call:
    """One call of the operator.

    Attributes:
        windows, modes: int32 ``[heads]``.
        low: modes of the unconditional half when some heads copy theirs from the other.
        saving: heads whose residual goes into slot number ``slot``.
        rest: whether other heads' residuals in that slot must stay.
    """

    windows: Tensor
    modes: Tensor
    low: Tensor
    slot: int
    saving: list[int]
    rest: bool


@dataclass(frozen=True)
class _Step:
    """An action made ready for one device.

    Attributes:
        sources: head -> slot of the residual that is added, ``None`` for none.
        live: slot -> whether it is needed after the step.
        zeros: some head's window has nothing added.
        shared, reusing: heads that copy one half of a guided batch, and heads that compute nothing.
    """

    action: Action
    calls: tuple[_Call, ...]
    sources: tuple[int | None, ...]
    live: tuple[bool, ...]
    zeros: bool
    shared: list[int]
    reusing: list[int]


class PlannedAttention:
    """An attention processor that follows a ``LayerPlan``.

    What it holds is void, and the next call full, when a new sampling starts, when the batch changes, and
    when a step did not follow the one before (a schedule that called another model in between).

    Args:
        heads: of the module.
        state: written by the sampler of the module's model.
        former: the processor that was in its place.
        form: of the module.
    """

    def __init__(
        self, plan: LayerPlan, heads: int, state: SamplingState, former: Any, form: Form = FORMS["attention"]
    ) -> None:
        if plan.heads not in (1, heads):
            raise SpaceError(f"the plan has rules for {plan.heads} heads, and the module has {heads}")
        self.plan, self.heads, self.state, self.former, self.form = plan, heads, state, former, form
        self._ready: dict[tuple[int, int, torch.device], tuple[_Step, ...]] = {}
        self._last = self._start = self._text = 0
        self._steps: tuple[_Step, ...] = ()
        self.void()

    def void(self) -> None:
        """Forget what earlier steps left."""
        self._key: tuple[Any, ...] = ()
        self._slots: list[Tensor | None] = []
        self._output: Output | None = None
        self._attended: Tensor | None = None

    def again(self) -> None:
        """Make the next call the same step once more, with what is held now. For timing."""
        self._last -= 1

    def resident_tensors(self) -> list[Tensor]:
        """Residuals and outputs that are held at this moment."""
        outputs = () if self._output is None else tensors_of(self._output)
        return [t for t in (*self._slots, *outputs, self._attended) if t is not None]

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        temb: Tensor | None = None,
    ) -> Output:
        """As the stock processor of the module, for ``hidden_states`` ``[batch, tokens, width]``.

        Returns:
            The image's output; with text beside it (SD3's and Flux's blocks) that and the text's.

        Raises:
            CapabilityError: for a mask, an image of four dimensions, or for keys of another sequence or
                rotary embeddings where the module's form takes none.
        """
        odd = attention_mask is not None or hidden_states.dim() != 3
        odd |= encoder_hidden_states is not None and not self.form.joins
        if odd or (image_rotary_emb is not None and not self.form.turns):
            raise CapabilityError(
                "a planned self-attention was called with keys of another sequence, a mask, rotary embeddings"
                " or an image of 4 dimensions; leave this module out of the plan"
            )
        x = Inputs(hidden_states, encoder_hidden_states, image_rotary_emb)
        step = self._next(x)
        output = self._output if step.action.reuses else self._compute(attn, x, step)
        assert output is not None
        self._output = _alone(output) if step.action.keep_output else None
        return output

    def _next(self, x: Inputs) -> _Step:
        """The step that this call is, after a look whether what is held fits it."""
        state, hidden = self.state, x.hidden
        self._text = self.form.text_tokens(x, state)
        key = state.started, state.total, state.guided, hidden.shape, self._text, hidden.dtype, hidden.device
        if state.index != self._last + 1 or key != self._key:
            self.void()
            self._key, self._start = key, state.index
            self._steps = self._prepared(max(state.total, state.index + 1), state.index, hidden.device)
        self._last = state.index
        return self._steps[state.index - self._start]

    def _prepared(self, total: int, start: int, device: torch.device) -> tuple[_Step, ...]:
        found = self._ready.get((total, start, device))
        if found is None:
            slots: Slots = []
            steps = []
            for action in self.plan.actions(total, start):
                after = slots if action.reuses else next_slots(slots, action)
                steps.append(_step(action, self.heads, slots, after, device))
                slots = after
            found = self._ready[total, start, device] = tuple(steps)
        return found

    def _compute(self, attn: Any, x: Inputs, step: _Step) -> Output:
        guided, batch = self.state.guided, len(x.hidden)
        whole = guided and len(step.shared) == self.heads  # one half is computed, the other is its copy
        split = guided and bool(step.shared) and not whole
        dense = step.action.dense and not split
        text_first = not dense or self.form.text_first  # our operator's order, or the module's own
        q, k, v = self.form.project(attn, x.rows(batch // 2) if whole else x, text_first)
        if dense:
            out = F.scaled_dot_product_attention(q, k, v)
            self._slots = []
        else:
            out = self._windows(q, k, v, step, split=split, batch=batch)
        if step.reusing:
            assert self._attended is not None
            out[:, step.reusing] = self._attended[:, step.reusing]
        self._attended = None
        if step.action.keep_heads:
            kept = out if text_first else out.roll(self._text, dims=2)
            self._attended = _both(kept) if whole else kept
        y = self.form.finish(attn, out, self._text, text_first)
        if not whole:
            return y
        return (_both(y[0]), _both(y[1])) if isinstance(y, tuple) else _both(y)

    def _windows(self, q: Tensor, k: Tensor, v: Tensor, step: _Step, *, split: bool, batch: int) -> Tensor:
        """Attention by our operator; residuals go into their slots, for all ``batch`` rows."""
        found: Tensor | None = None
        residual = self._residual(step, q.shape[0])
        self._slots += [None] * (len(step.live) - len(self._slots))
        for call in step.calls:
            if split:
                out, saved = _halves(q, k, v, residual, call, step.shared, self._text)
            else:
                out, saved = attention_window_residual(
                    q, k, v, call.windows, self._text, residual, call.modes
                )
            if call.saving:
                self._save(call, saved if q.shape[0] == batch else _both(saved))
            found, residual = out if found is None else found, None
        self._slots = [t if live else None for t, live in zip(self._slots, step.live, strict=False)]
        assert found is not None
        return found

    def _save(self, call: _Call, saved: Tensor) -> None:
        kept = self._slots[call.slot]
        if call.rest and kept is not None:
            kept[:, call.saving] = saved[:, call.saving]
        else:
            self._slots[call.slot] = saved

    def _residual(self, step: _Step, rows: int) -> Tensor | None:
        """What the window heads add, for the first ``rows`` of the batch; zeros where they add nothing."""
        slots = {s: t for s in step.sources if s is not None and (t := self._slots[s]) is not None}
        if len(slots) == 1 and not step.zeros:
            return next(iter(slots.values()))[:rows]
        joined = None
        for h, source in enumerate(step.sources):
            if source is not None:
                slot = slots[source][:rows]
                joined = torch.zeros_like(slot) if joined is None else joined
                joined[:, h] = slot[:, h]
        return joined


def _step(action: Action, heads: int, before: Slots, after: Slots, device: torch.device) -> _Step:
    if len(action.rules) == 1:
        action_rules, saves = action.rules * heads, action.saves * heads
        before = [slot * heads if len(slot) == 1 else slot for slot in map(tuple, before)]
        after = [slot * heads if len(slot) == 1 else slot for slot in map(tuple, after)]
    else:
        action_rules, saves = action.rules, action.saves
    sources = tuple(
        next(k for k, slot in enumerate(before) if slot[h] == rule.window) if rule.residual else None
        for h, rule in enumerate(action_rules)
    )
    most = max(1, *(len(s) for s in saves)) if not action.reuses else 0
    return _Step(
        action=action,
        calls=tuple(_call(k, action_rules, saves, after, device) for k in range(most)),
        sources=sources,
        live=tuple(any(w is not None for w in slot) for slot in after),
        zeros=any(r.kind == "window" and not r.residual for r in action_rules),
        shared=[h for h, r in enumerate(action_rules) if r.shared],
        reusing=[h for h, r in enumerate(action_rules) if r.kind == "reuse"],
    )


def _call(
    k: int, rules: Sequence[Any], saves: Sequence[Sequence[int]], after: Slots, device: torch.device
) -> _Call:
    """The k-th call: the first one computes, those after it only save residuals of further windows."""
    windows, modes = [], []
    for rule, own in zip(rules, saves, strict=True):
        saving = k < len(own)
        windows.append(own[k] if saving else rule.window)
        if saving:
            modes.append(FULL_SAVE)
        elif k or rule.kind == "reuse":
            modes.append(REUSE)
        else:
            modes.append(FULL if rule.kind == "full" else WINDOW_ADD)
    low = [REUSE if rule.shared else mode for rule, mode in zip(rules, modes, strict=True)]
    heads = [h for h, own in enumerate(saves) if k < len(own)]
    slot = after[k] if k < len(after) else ()
    rest = any(w is not None and h not in heads for h, w in enumerate(slot))

    def integers(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    return _Call(integers(windows), integers(modes), integers(low), k, heads, rest)


def _both(x: Tensor) -> Tensor:
    """The conditional half, for both."""
    return torch.cat([x, x])


def _alone(output: Output) -> Output:
    """The output without storage that it shares with something larger, to be held."""
    if isinstance(output, tuple):
        image, text = output
        return image, text if text.untyped_storage().nbytes() == text.nbytes else text.clone()
    return output


def _halves(
    q: Tensor, k: Tensor, v: Tensor, residual: Tensor | None, call: _Call, shared: list[int], text: int
) -> tuple[Tensor, Tensor]:
    """The operator on both halves of a guided batch; ``shared`` heads are computed in the first one."""
    half = q.shape[0] // 2
    top, low = slice(None, half), slice(half, None)
    results = [
        attention_window_residual(
            q[rows], k[rows], v[rows], call.windows, text, None if residual is None else residual[rows], modes
        )
        for rows, modes in ((top, call.modes), (low, call.low))
    ]
    joined = []
    for first, second in zip(*results, strict=True):
        second[:, shared] = first[:, shared]
        joined.append(torch.cat([first, second]))
    return joined[0], joined[1]
