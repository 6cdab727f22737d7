"""One rule for each ATen operation (and for attention, packed weights, picked experts): how it is written in
operations of the C step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autocomp.serving.lower import CONSTANT_LIMIT, Lowering, Place, Rule, Step
from autocomp.serving.record import Note, Unsupported, storage


def _unary(kind: str) -> Rule:
    def rule(low: Lowering, note: Note) -> None:
        low.elementwise(kind, low.place(note.out), low.place(note.args[0]))

    return rule


def _cast(low: Lowering, note: Note) -> None:
    if note.args[0].is_floating_point() and not note.out.is_floating_point():
        raise Unsupported("a float is rounded to an integer")
    low.elementwise("copy", low.place(note.out), low.place(note.args[0]))


def _scalar(value: Any) -> float | None:
    """The number that an operand is, if it is one (a 0-dim constant is left as a tensor)."""
    return float(value) if isinstance(value, int | float | bool) else None


def _add(sign: float) -> Rule:
    def rule(low: Lowering, note: Note) -> None:
        factor = sign * float(note.extra.get("alpha", 1))
        out, a, b = low.place(note.out), note.args[0], note.args[1]
        number = _scalar(b)
        if number is not None:
            low.elementwise("shift", out, low.place(a), alpha=factor * number)
        else:
            low.elementwise("add", out, low.place(a), low.place(b), alpha=factor)

    return rule


def _rsub(low: Lowering, note: Note) -> None:
    out, a, number = low.place(note.out), low.place(note.args[0]), _scalar(note.args[1])
    if number is None or note.extra.get("alpha", 1) != 1:
        raise Unsupported("rsub of two tensors")
    low.elementwise("neg", out, a)
    low.elementwise("shift", out, out, alpha=number)


def _mul(low: Lowering, note: Note) -> None:
    out, a, b = low.place(note.out), note.args[0], note.args[1]
    number = _scalar(b)
    if number is not None:
        low.elementwise("scale", out, low.place(a), alpha=number)
    else:
        low.elementwise("mul", out, low.place(a), low.place(b))


def _div(low: Lowering, note: Note) -> None:
    if note.extra.get("rounding_mode"):
        raise Unsupported("a rounding division")
    out, a, b = low.place(note.out), note.args[0], note.args[1]
    number = _scalar(b)
    if number is not None:
        low.elementwise("scale", out, low.place(a), alpha=1.0 / number)
    else:
        low.elementwise("div", out, low.place(a), low.place(b))


def _binary(kind: str) -> Rule:
    def rule(low: Lowering, note: Note) -> None:
        low.elementwise(kind, low.place(note.out), low.place(note.args[0]), low.place(note.args[1]))

    return rule


def _pow(low: Lowering, note: Note) -> None:
    out, a, power = low.place(note.out), low.place(note.args[0]), float(note.args[1])
    named = {2.0: "square", 1.0: "copy", 0.5: "sqrt", -0.5: "rsqrt", -1.0: "reciprocal"}
    if power in named:
        low.elementwise(named[power], out, a)
    elif power == 3.0 and out.buffer != a.buffer:
        low.elementwise("square", out, a)
        low.elementwise("mul", out, out, a)
    else:
        low.elementwise("pow", out, a, alpha=power)


def _gelu(low: Lowering, note: Note) -> None:
    kind = "gelu_tanh" if note.extra.get("approximate", "none") == "tanh" else "gelu"
    low.elementwise(kind, low.place(note.out), low.place(note.args[0]))


def _clamp(low: Lowering, note: Note) -> None:
    limits = dict(zip(("min", "max"), note.args[1:])) | note.extra
    least, most = limits.get("min"), limits.get("max")
    low.elementwise(
        "clamp", low.place(note.out), low.place(note.args[0]),
        alpha=-3.0e38 if least is None else float(least), beta=3.0e38 if most is None else float(most),
    )  # fmt: skip


def _cat(low: Lowering, note: Note) -> None:
    parts, dim = note.args[0], note.args[1] if len(note.args) > 1 else note.extra.get("dim", 0)
    first = 0
    for part in parts:
        if part.numel():
            width = part.shape[dim]
            low.elementwise("copy", low.place(note.out.narrow(dim, first, width)), low.place(part))
            first += width


def _stack(low: Lowering, note: Note) -> None:
    parts, dim = note.args[0], note.args[1] if len(note.args) > 1 else note.extra.get("dim", 0)
    for i, part in enumerate(parts):
        low.elementwise("copy", low.place(note.out.select(dim, i)), low.place(part))


def _last_dimension(note: Note, position: int) -> int:
    """Length of the last dimension, which the operation must be over."""
    x = note.args[0]
    dims = note.args[position] if len(note.args) > position else note.extra.get("dim", -1)
    dims = [dims] if isinstance(dims, int) else list(dims or [])
    if [d % x.ndim for d in dims] != [x.ndim - 1]:
        raise Unsupported(f"{note.name} over dimensions {dims} of {x.ndim}")
    return int(x.shape[-1])


def _reduce(kind: str, mean: bool = False) -> Rule:
    def rule(low: Lowering, note: Note) -> None:
        n = _last_dimension(note, 1)
        a, out = low.dense(low.place(note.args[0])), low.place(note.out)
        factor = 1.0 / n if mean else 1.0
        shape = (note.args[0].numel() // n, n)
        low.through_dense(out, lambda o: low.add(Step(kind, o, a, alpha=factor, n=shape)))

    return rule


def _softmax(low: Lowering, note: Note) -> None:
    n = _last_dimension(note, 1)
    a, out = low.dense(low.place(note.args[0])), low.place(note.out)
    low.through_dense(out, lambda o: low.add(Step("softmax", o, a, n=(note.args[0].numel() // n, n))))


def _topk(low: Lowering, note: Note) -> None:
    x, k = note.args[0], int(note.args[1])
    options = dict(zip(("dim", "largest", "sorted"), note.args[2:])) | note.extra
    if options.get("dim", -1) % x.ndim != x.ndim - 1 or not options.get("largest", True):
        raise Unsupported("topk that isn't the largest of the last dimension")
    values, index = (low.place(t) for t in note.out)
    if not (values.contiguous and index.contiguous):
        raise Unsupported("topk into a view")
    n = x.shape[-1]
    low.add(Step("topk", values, low.dense(low.place(x)), index, n=(x.numel() // n, n, k)))


def _layer_norm(low: Lowering, note: Note) -> None:
    x, shape, weight, bias, eps = (*note.args, *[None] * 5)[:5]
    if list(shape) != [x.shape[-1]]:
        raise Unsupported("a layer norm over several dimensions")
    a, out = low.dense(low.place(x)), low.place(note.out[0])
    step = Step("layer_norm", out, a, alpha=float(eps), n=(x.numel() // x.shape[-1], x.shape[-1]))
    step.c = None if weight is None else low.place(weight)
    step.b = None if bias is None else low.place(bias)
    low.add(step)


def _rms_norm(low: Lowering, note: Note) -> None:
    x, shape, weight, eps = (*note.args, *[None] * 4)[:4]
    if list(shape) != [x.shape[-1]]:
        raise Unsupported("an RMS norm over several dimensions")
    out = low.place(note.out[0] if isinstance(note.out, tuple) else note.out)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    step = Step("rms_norm", out, low.dense(low.place(x)), alpha=float(eps))
    step.n = (x.numel() // x.shape[-1], x.shape[-1])
    step.c = None if weight is None else low.place(weight)
    low.add(step)


def _matmul(low: Lowering, note: Note) -> None:
    """Batched product of two small tensors (rotary frequencies)."""
    a, b, out = (low.place(t) for t in (note.args[0], note.args[1], note.out))
    if len(a.size) == 2:
        a, b, out = (Place(p.buffer, p.offset, (1, *p.size), (0, *p.stride)) for p in (a, b, out))
    (t, i, k), j = a.size, b.size[2]
    if t * i * j * k > CONSTANT_LIMIT:
        raise Unsupported("a large product of two activations")
    a, b, out = (Place(p.buffer, p.offset, (1, *p.size), (0, *p.stride)) for p in (a, b, out))
    low.add(Step("matmul", out, a, b, n=(t, i, k, j)))


def _mm(low: Lowering, note: Note) -> None:
    x, w = note.args[-2:]
    bias = note.args[0] if len(note.args) == 3 else None
    if storage(w) in low.recording.dynamic:
        if bias is not None:
            raise Unsupported("addmm of activations")
        _matmul(low, note)
        return
    if any(note.extra.get(name, 1) != 1 for name in ("alpha", "beta")):
        raise Unsupported("a scaled addmm")
    if bias is not None and (bias.ndim != 1 or storage(bias) in low.recording.dynamic):
        raise Unsupported("addmm with a bias that is no constant vector")
    _linear(low, x, (w.t(), bias), note.out)


def _aten_linear(low: Lowering, note: Note) -> None:
    x, w, bias = (*note.args, None)[:3]
    _linear(low, x, (w, bias), note.out)


def _packed_linear(low: Lowering, note: Note) -> None:
    _linear(low, note.args[0], note.extra["module"], note.out)


def _pick_linear(low: Lowering, note: Note) -> None:
    x, table, pick = note.args
    _linear(low, x, (table, None), note.out, pick=low.place(pick))


def _linear(low: Lowering, x: Tensor, weight: Any, out: Tensor, pick: Place | None = None) -> None:
    rows = (x.numel() // x.shape[-1], x.shape[-1])
    a = low.dense(low.place(x))
    low.through_dense(
        low.place(out), lambda o: low.add(Step("linear", o, a, n=rows, weight=weight, pick=pick))
    )


def _embedding(low: Lowering, note: Note) -> None:
    table, index = note.args[:2]
    if storage(table) in low.recording.dynamic:
        raise Unsupported("an embedding whose table changes")
    _rows(low, (table, None), index, note.out)


def _packed_rows(low: Lowering, note: Note) -> None:
    module = note.extra["module"]
    _rows(low, module, note.args[0], note.out)
    if module.scale != 1.0:
        low.elementwise("scale", low.place(note.out), low.place(note.out), alpha=float(module.scale))


def _rows(low: Lowering, weight: Any, index: Tensor, out: Tensor) -> None:
    a = low.dense(low.place(index))
    low.through_dense(
        low.place(out), lambda o: low.add(Step("rows", o, a, n=(index.numel(),), weight=weight))
    )


def _attention(low: Lowering, note: Note) -> None:
    q, k, v = (low.dense(low.place(t)) for t in note.args)
    batch, heads, _, dim = note.args[0].shape
    facts = {**note.extra, "batch": batch, "heads": heads, "kv_heads": note.args[1].shape[1], "dim": dim}
    step = Step("attend", low.place(note.out), q, k, v, alpha=facts["scale"], beta=facts["softcap"])
    step.attention, step.n = facts, (facts["window"],)
    low.add(step)


def _index_select(low: Lowering, note: Note) -> None:
    """Look-up in a constant table (learned positions as a parameter)."""
    table, dim, index = note.args
    if dim != 0 or table.ndim != 2 or storage(table) in low.recording.dynamic:
        raise Unsupported("index_select of activations")
    _rows(low, (table, None), index, note.out)


RULES: dict[str, Rule] = {
    "_to_copy.default": _cast, "clone.default": _unary("copy"), "lift_fresh.default": _unary("copy"),
    **{
        f"{name}.default": _unary(name)
        for name in ("neg", "abs", "sqrt", "rsqrt", "reciprocal", "exp", "log", "sin", "cos", "tanh",
                     "sigmoid", "silu", "relu", "floor")
    },
    "copy_.default": lambda low, note: low.elementwise("copy", low.place(note.out), low.place(note.args[1])),
    "add.Tensor": _add(1.0), "add_.Tensor": _add(1.0), "add.Scalar": _add(1.0),
    "sub.Tensor": _add(-1.0), "sub_.Tensor": _add(-1.0), "rsub.Scalar": _rsub,
    "mul.Tensor": _mul, "mul_.Tensor": _mul, "mul.Scalar": _mul,
    "div.Tensor": _div, "div_.Tensor": _div, "div.Scalar": _div,
    "maximum.default": _binary("max"), "minimum.default": _binary("min"),
    "pow.Tensor_Scalar": _pow, "gelu.default": _gelu, "clamp.default": _clamp,
    "cat.default": _cat, "stack.default": _stack,
    "mean.dim": _reduce("sum", mean=True), "sum.dim_IntList": _reduce("sum"), "amax.default": _reduce("amax"),
    "_softmax.default": _softmax, "topk.default": _topk,
    "native_layer_norm.default": _layer_norm, "rms_norm.default": _rms_norm,
    "_fused_rms_norm.default": _rms_norm,
    "mm.default": _mm, "addmm.default": _mm, "bmm.default": _matmul, "linear.default": _aten_linear,
    "packed_linear": _packed_linear, "pick_linear": _pick_linear,
    "embedding.default": _embedding, "packed_rows": _packed_rows, "index_select.default": _index_select,
    "attention": _attention,
}  # fmt: skip
