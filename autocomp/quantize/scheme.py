"""How one weight matrix is stored: bits, group size, symmetry, outliers. No torch here.

Label grammar (what users write and what candidates hold): ``w{bits}[g{group}][a][o{percent}]``

- ``w4g64``      4 bits, groups of 64 along the input dimension, symmetric
- ``w4g64a``     the same with a zero point (asymmetric)
- ``w8``         8 bits, one scale a row (output channel)
- ``w3g128o0.5`` plus the 0.5 % largest weights kept in 16 bits (LLM-MQ, section 3.3)
- ``w16``        not quantized
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_LABEL = re.compile(r"^w(\d+)(?:g(\d+))?(a?)(?:o(\d+(?:\.\d+)?))?$")
BITS = (2, 3, 4, 5, 6, 8, 16)


@dataclass(frozen=True)
class Scheme:
    """Storage of a weight of shape ``[N, K]`` (output, input features).

    Attributes:
        bits: 2, 3, 4, 5, 6, 8, or 16 for "left as it is".
        group: weights along K that share a scale; 0 means the whole row. The last group may be short.
        symmetric: codes centred on zero and no zero point stored.
        outliers: percent of weights (largest magnitude) kept in 16 bits beside the codes.
    """

    bits: int
    group: int = 0
    symmetric: bool = True
    outliers: float = 0.0

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"bits must be one of {BITS}; got {self.bits}")
        if self.group < 0 or (self.group and self.group % 8):
            raise ValueError(f"group must be 0 (a row) or a multiple of 8; got {self.group}")
        if not 0.0 <= self.outliers <= 10.0:
            raise ValueError(f"outliers must be 0 to 10 percent; got {self.outliers}")
        if self.bits == 16 and (self.group or not self.symmetric or self.outliers):
            raise ValueError("w16 means 'not quantized' and takes no group, zero point or outliers")

    @classmethod
    def parse(cls, label: str) -> Scheme:
        """Read a label; raises ``ValueError`` with the grammar when it does not fit."""
        match = _LABEL.match(label)
        if match is None:
            grammar = "w{bits}[g{group}][a][o{percent}], like w4g64a"
            raise ValueError(f"can't read the scheme {label!r}: write {grammar}")
        bits, group, asymmetric, outliers = match.groups()
        return cls(int(bits), int(group or 0), not asymmetric, float(outliers or 0.0))

    @property
    def label(self) -> str:
        group = f"g{self.group}" if self.group else ""
        outliers = f"o{self.outliers:g}" if self.outliers else ""
        return f"w{self.bits}{group}{'' if self.symmetric else 'a'}{outliers}"

    @property
    def is_dense(self) -> bool:
        return self.bits == 16

    def groups(self, columns: int) -> int:
        """Number of groups in a row of ``columns`` weights."""
        return 1 if self.group == 0 else -(-columns // self.group)

    def outlier_count(self, rows: int, columns: int) -> int:
        return round(rows * columns * self.outliers / 100.0)

    def weight_bytes(self, rows: int, columns: int) -> int:
        """Bytes of the packed form: codes (rows padded to 32-bit words), 16-bit scales, packed zero
        points, and outliers (16-bit value, 32-bit position). ``w16``: two bytes a weight."""
        if self.is_dense:
            return 2 * rows * columns
        groups = self.groups(columns)
        codes = 4 * rows * -(-columns * self.bits // 32)
        zeros = 0 if self.symmetric else 4 * groups * -(-rows * self.bits // 32)
        return codes + 2 * rows * groups + zeros + 6 * self.outlier_count(rows, columns)

    def __str__(self) -> str:
        return self.label
