"""Writes the 141 M-parameter V4 checkpoint that all engines run, once per layout they read.

    python checkpoint.py WORK [--llama-source llama.cpp]

Below WORK: `official` (fp8 and MXFP4, what tenfold reads), `plain` (the same values in bf16, for transformers),
`q8.gguf` (llama.cpp's conversion of the official files: Q8_0 and MXFP4) and `bf16.gguf` (BF16 and MXFP4, no value
changed). The GGUF files come from llama.cpp's own converter, in the source package of llama-cpp-python under
vendor/llama.cpp, which needs transformers and gguf. Needs tenfold for the first two; knows nothing of timing.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

SHAPE = {
    "moe_intermediate_size": 256,
    "num_attention_heads": 8,
    "q_lora_rank": 256,
    "o_groups": 2,
    "o_lora_rank": 256,
    "index_n_heads": 8,
    "num_hash_layers": 2,
    "num_nextn_predict_layers": 0,
}
COMPRESS_RATIOS = [0, 0, 4, 128, 4, 128, 4, 0]


def main() -> int:
    parser = argparse.ArgumentParser(description="Writes the checkpoint that all engines run.")
    parser.add_argument("work", type=Path)
    parser.add_argument("--llama-source", type=Path, help="vendor/llama.cpp of llama-cpp-python's source package")
    parser.add_argument("--convert", nargs=2, metavar=("FOLDER", "GGUF"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.convert:
        convert(options.llama_source, *options.convert)
    else:
        write_safetensors(options.work)
    return 0


def write_safetensors(work: Path) -> None:
    """`official`, `plain`, and `mixed`: bf16 but for the experts, which the converter takes over code by code."""
    from tenfold.config import parse
    from tenfold.synth import shrink, synth

    small = shrink("v4-flash", layers=8, hidden=512, experts=32, vocab=8192, **SHAPE)
    config = parse({**small.raw, "compress_ratios": COMPRESS_RATIOS})
    for name, fmt in (("official", "official"), ("plain", "bf16")):
        if not (work / name).exists():
            synth(config, work / name, fmt=fmt)
    if not (work / "mixed").exists():
        write_mixed(work)


def write_mixed(work: Path) -> None:
    from safetensors.torch import load_file, save_file

    plain, official = ({}, {})
    for name, tensors in (("plain", plain), ("official", official)):
        for file in sorted((work / name).glob("*.safetensors")):
            tensors.update(load_file(file))
    experts = {key: value for key, value in official.items() if ".ffn.experts." in key}
    partial = work / "mixed.partial"
    partial.mkdir(exist_ok=True)
    save_file(plain | experts, partial / "model.safetensors", metadata={"format": "pt"})
    words = json.loads((work / "official" / "config.json").read_text(encoding="utf-8"))
    del words["quantization_config"]
    (partial / "config.json").write_text(json.dumps(words, indent=1), encoding="utf-8")
    partial.rename(work / "mixed")


def write_gguf(work: Path, python: str, llama_source: Path) -> None:
    """Both GGUF files, in a process of their own under the peers' interpreter."""
    for folder, name in (("official", "q8.gguf"), ("mixed", "bf16.gguf")):
        if (work / name).exists():
            continue
        partial = work / f"partial-{name}"
        command = [python, __file__, str(work), "--llama-source", str(llama_source)]
        subprocess.run([*command, "--convert", str(work / folder), str(partial)], check=True)
        os.replace(partial, work / name)


def convert(llama_source: Path, folder: str, out: str) -> None:
    """llama.cpp's converter, with a vocabulary of placeholders: the checkpoint has no tokenizer."""
    sys.path[:0] = [str(llama_source / "gguf-py"), str(llama_source)]
    from conversion.deepseek import DeepseekV4Model

    def set_vocab(self: DeepseekV4Model) -> None:
        writer, size = self.gguf_writer, self.hparams["vocab_size"]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("deepseek-v3")
        writer.add_token_list(["a", "b", "ab", *(f"token{i}" for i in range(3, size))])
        writer.add_token_types([1] * size)
        writer.add_token_merges(["a b"])

    DeepseekV4Model.set_vocab = set_vocab
    sys.argv = ["convert_hf_to_gguf.py", folder, "--outfile", out]
    runpy.run_path(str(llama_source / "convert_hf_to_gguf.py"), run_name="__main__")


if __name__ == "__main__":
    sys.exit(main())
