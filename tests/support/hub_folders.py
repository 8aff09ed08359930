"""Folders as the hub has them, of models that no recipe knows: odd sizes, made and saved by `transformers`."""

from __future__ import annotations

import json
from pathlib import Path

import torch

WORDS = 259
"""Tokens of the tokenizer before any is added: three special ones and the 256 bytes."""

ADDED = ("<|turn|>", "<|stop|>", "cat")

CHAT = (
    "{% for m in messages %}<|turn|>{{ m['role'] }}\n{{ m['content'] }}<|stop|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


def make_tokenizer(folder: Path, added: tuple[str, ...] = ADDED) -> Path:
    """A byte-level tokenizer with a chat template and tokens that the model's vocabulary has no rows for."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **names)
    tokenizer.add_tokens(list(added), special_tokens=True)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return folder


def qwen2_config(**changes):
    """A Qwen2 of five heads of width 8, which share one key-value head, and a head tied to the embedding."""
    from transformers import Qwen2Config

    numbers = {"vocab_size": WORDS, "hidden_size": 40, "intermediate_size": 72, "num_hidden_layers": 3}
    numbers |= {"num_attention_heads": 5, "num_key_value_heads": 1, "max_position_embeddings": 512}
    numbers |= {"rope_parameters": {"rope_type": "default", "rope_theta": 12345.0}, "tie_word_embeddings": True}
    return Qwen2Config(**(numbers | {"bos_token_id": 0, "eos_token_id": 1} | changes))


def make_llm(folder: Path, config=None, seed: int = 0, tokenizer: bool = True) -> Path:
    """A causal language model in several safetensors files with an index, and its tokenizer."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config or qwen2_config()).save_pretrained(folder, max_shard_size="40KB")
    return make_tokenizer(folder) if tokenizer else folder


def siglip_config(**changes):
    """A SigLIP tower of 6 x 6 patches of 7 pixels."""
    from transformers import SiglipVisionConfig

    numbers = {"hidden_size": 36, "intermediate_size": 50, "num_hidden_layers": 4, "num_attention_heads": 3}
    return SiglipVisionConfig(**(numbers | {"image_size": 42, "patch_size": 7} | changes))


def make_vision(folder: Path, config=None, seed: int = 0, **prepares) -> Path:
    """A vision tower with its preprocessor_config.json."""
    from transformers import AutoModel

    torch.manual_seed(seed)
    AutoModel.from_config(config or siglip_config()).save_pretrained(folder)
    write_preprocessor(folder, **({"size": {"height": 42, "width": 42}} | prepares))
    return folder


def write_preprocessor(folder: Path, **changes) -> None:
    """`preprocessor_config.json` with the keys that such files have."""
    content = {"do_normalize": True, "do_rescale": True, "do_resize": True, "rescale_factor": 1 / 255, "resample": 3}
    content |= {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "image_processor_type": "Made"}
    (folder / "preprocessor_config.json").write_text(json.dumps(content | changes))


def change_config(folder: Path, **changes) -> None:
    """Change keys of the folder's config.json; None removes one."""
    path = folder / "config.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
