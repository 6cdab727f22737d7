"""Swapping weights in and out of a loaded model: from the layer bank, and always back to the originals."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from autocomp.attention.runtime import plain_attention
from autocomp.errors import SpaceError
from autocomp.kernels.convolution import ConvForm, PackedConv2d
from autocomp.kernels.modules import PackedEmbedding, PackedLinear
from autocomp.quantize.bank import LayerBank, default_folder, tensor_hash
from autocomp.quantize.rounding import quantize
from autocomp.quantize.scheme import Scheme
from autocomp.quantize.tensor import QuantizedTensor
from autocomp.workloads.base import Built

logger = logging.getLogger("autocomp")
DENSE = "w16"


@dataclass
class WeightSwapper:
    """Keeps a built model's original modules and weights, and brings the model to any mix of labels.

    In the scoring state a module holds the dequantized weight in the model's dtype; in the serving state
    it is replaced by a packed module that runs the kernels. ``Conv1D`` weights are ``[in, out]``, those of
    convolutions ``[out, channels, height, width]``; all tensors here are ``[out, in]``.

    Attributes:
        built: the model, with the originals of every part.
        bank: where quantized weights are kept.
        hessian: path -> X'X of its calibration inputs, float32 ``[in, in]``; called on the original model.
        calibration: stands for the calibration data in the bank's keys.
        labels: path -> label of every weight that is not the original at this moment.
        method: rounding of those labels.
        serving: whether packed modules are in place.
    """

    built: Built
    bank: LayerBank
    hessian: Callable[[str], torch.Tensor] | None = None
    calibration: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    method: str = "rtn"
    serving: bool = False
    _modules: dict[str, nn.Module] = field(default_factory=dict)
    _hashes: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, built: Built) -> WeightSwapper:
        """The swapper of a built model, made on first use."""
        found = built.state.get("swapper")
        if found is None:
            bank = built.state.get("bank")  # compared with None: an empty bank has length 0
            bank = LayerBank(folder=default_folder()) if bank is None else bank
            found = cls(built, bank, built.state.get("hessian"), built.state.get("calibration", ""))
            built.state["swapper"] = found
        assert isinstance(found, cls)
        return found

    def apply(self, labels: Mapping[str, str], *, method: str, serving: bool) -> None:
        """Bring every named path to its label; paths that are not named go back to the original.

        When this fails half-way (out of memory), ``restore`` still brings every original back.
        """
        wanted = {path: label for path, label in labels.items() if label != DENSE}
        # Quantize first: error-compensated rounding needs the original model for its calibration pass.
        tensors = {p: self._entry(p, label, method) for p, label in wanted.items() if self._owner(p) == p}
        if serving or self.serving or method != self.method:
            self.restore()
        self.built.changed.add("weights")
        self.method = method
        if serving:
            self._serve(wanted, tensors)
        else:
            self._score(wanted, tensors)
        if not wanted:
            self.built.changed.discard("weights")

    def restore(self) -> None:
        """Put every original module and weight back."""
        for path in self.labels:
            module = self._module(path)
            if self.serving:
                _put(self.built.model, path, module)
            if self._owner(path) == path:
                self._set_dense(path, self.built.originals[path])
        self.labels, self.serving = {}, False
        self.built.changed.discard("weights")

    def forget(self) -> None:
        """The restored originals have new content (merged checkpoints): forget what is known of them."""
        self._hashes.clear()

    def quantized(self, path: str, label: str, method: str) -> QuantizedTensor:
        """The bank's entry for a path under a label; ``method`` as in ``quantize``. The model stays as it
        is: where a calibration pass needs the originals, they are there for that pass only.

        Raises:
            SpaceError: error-compensated rounding, and the workload gives no calibration data.
        """
        with self._kept_state():
            return self._entry(path, label, method)

    @contextmanager
    def _kept_state(self) -> Iterator[None]:
        labels, method, serving = dict(self.labels), self.method, self.serving
        try:
            yield
        finally:
            if labels != self.labels or serving != self.serving:
                self.apply(labels, method=method, serving=serving)

    def _entry(self, path: str, label: str, method: str) -> QuantizedTensor:
        """As ``quantized``, but the model may be left in its original state."""
        scheme = Scheme.parse(label)
        weight = self._original(path)
        gptq = method.startswith("gptq") and self.built.site.part(path).kind != "embedding"
        if method.startswith("gptq") and not gptq:
            method = "mse"  # an embedding has no calibration inputs
        dtype = _scale_dtype(weight.dtype)
        key = LayerBank.key(self._hash(path), scheme, method, dtype, self.calibration if gptq else "")

        def build() -> QuantizedTensor:
            hessian = self._calibrated(path) if gptq else None
            return quantize(weight.float(), scheme, method=method, hessian=hessian, scale_dtype=dtype)

        return self.bank.get(key, scheme, build, keep_on_disk=method != "rtn")

    def _calibrated(self, path: str) -> torch.Tensor:
        if self.hessian is None:
            raise SpaceError(
                "error-compensated rounding needs calibration data, which this workload does not give;"
                " use method: mse"
            )
        self.restore()
        with plain_attention(self.built):
            return self.hessian(path)

    def move(self, path: str, here: str, there: str, method: str) -> torch.Tensor:
        """Weight under ``there`` minus weight under ``here``, float32 ``[out, in]``."""
        return self._weight(path, there, method) - self._weight(path, here, method)

    def _weight(self, path: str, label: str, method: str) -> torch.Tensor:
        if label == DENSE:
            return self._original(path).float()
        return self.quantized(path, label, method).dequantize(torch.float32).to(self.built.device)

    def _score(self, wanted: Mapping[str, str], tensors: Mapping[str, QuantizedTensor]) -> None:
        for path in {*self.labels, *wanted}:
            if self.labels.get(path) == wanted.get(path):
                continue
            if self._owner(path) == path:
                original = self.built.originals[path]
                dense = self._dequantized(path, tensors[path]) if path in tensors else original
                self._set_dense(path, dense)
            self._note(path, wanted.get(path, DENSE))

    def _serve(self, wanted: Mapping[str, str], tensors: Mapping[str, QuantizedTensor]) -> None:
        self.serving = True
        embeddings: dict[str, PackedEmbedding] = {}
        for path in sorted(wanted, key=lambda p: self._owner(p) != p):  # owners before borrowers
            module, owner = self._module(path), self._owner(path)
            bias = getattr(module, "bias", None)
            packed: nn.Module
            if self.built.site.part(path).kind == "embedding":
                packed = embeddings[path] = PackedEmbedding(
                    tensors[path],
                    device=self.built.device,
                    dtype=self._dtype(),
                    scale=embedding_scale(module),
                )
            elif owner in embeddings:
                packed = PackedLinear.sharing(embeddings[owner], bias=bias)
            else:
                packed = self._packed(module, tensors[owner], bias)
            self._note(path, wanted[path])
            _put(self.built.model, path, packed)

    def _packed(self, module: nn.Module, weight: QuantizedTensor, bias: torch.Tensor | None) -> PackedLinear:
        device, dtype = self.built.device, self._dtype()
        if isinstance(module, nn.Conv2d):
            return PackedConv2d(weight, ConvForm.of(module), bias, device=device, dtype=dtype)
        return PackedLinear(weight, bias=bias, device=device, dtype=dtype)

    def _note(self, path: str, label: str) -> None:
        """Write down what a path is being brought to, step by step, for ``restore``."""
        if label == DENSE:
            self.labels.pop(path, None)
        else:
            self.labels[path] = label

    def _module(self, path: str) -> nn.Module:
        if path not in self._modules:
            self._modules[path] = self.built.model.get_submodule(path)
        return self._modules[path]

    def _owner(self, path: str) -> str:
        return self.built.site.part(path).shared_with or path

    def _dtype(self) -> torch.dtype:
        dtype = self.built.model.dtype
        assert isinstance(dtype, torch.dtype)
        return dtype

    def _transposed(self, path: str) -> bool:
        return type(self._module(path)).__name__ == "Conv1D"

    def _original(self, path: str) -> torch.Tensor:
        """The uncompressed weight ``[out, in]``."""
        weight = self.built.originals[path]
        return weight.T if self._transposed(path) else weight.flatten(1)

    def _dequantized(self, path: str, tensor: QuantizedTensor) -> torch.Tensor:
        """The weight that a packed one stands for, as the module stores it."""
        original = self.built.originals[path]
        weight = tensor.dequantize(original.dtype).to(original.device)
        return weight.T if self._transposed(path) else weight.view(original.shape)

    def _set_dense(self, path: str, weight: torch.Tensor) -> None:
        parameter = self._module(path).weight
        assert isinstance(parameter, nn.Parameter)
        parameter.data = weight

    def _hash(self, path: str) -> str:
        if path not in self._hashes:
            self._hashes[path] = tensor_hash(self._original(path))
        return self._hashes[path]


def embedding_scale(module: nn.Module) -> float:
    """The factor that some embeddings (Gemma's) put on every row."""
    return float(getattr(module, "embed_scale", 1.0))


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """Scales are 16-bit: the model's own 16-bit type, bfloat16 for a float32 model."""
    return torch.float16 if dtype == torch.float16 else torch.bfloat16
