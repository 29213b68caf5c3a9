"""Writes a Qwen2 model of make_model.py as a bf16 GGUF file: make_gguf.py FOLDER FILE."""

from __future__ import annotations

import json
import pathlib
import sys

import gguf
import torch
from safetensors.torch import load_file

# Hugging Face's names within a layer, and GGUF's.
LAYER_NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down"}
GLOBAL_NAMES = {"model.embed_tokens.weight": "token_embd.weight",
                "model.norm.weight": "output_norm.weight"}


def gguf_name(name: str) -> str:
    """Returns GGUF's name of a tensor."""
    if name in GLOBAL_NAMES:
        return GLOBAL_NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    module, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{LAYER_NAMES[module]}.{kind}"


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit("usage: make_gguf.py FOLDER FILE")
    folder, file = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    unfinished = file.with_name(file.name + ".unfinished")
    writer = gguf.GGUFWriter(unfinished, "qwen2")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("none")
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name == "lm_head.weight":  # tied: token_embd serves as head
            continue
        if tensor.ndim == 1:  # norms and biases are f32 in GGUF
            writer.add_tensor(gguf_name(name), tensor.float().numpy())
        else:
            writer.add_tensor(gguf_name(name), tensor.contiguous().view(torch.uint8).numpy(),
                              raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.rename(file)


if __name__ == "__main__":
    main()
