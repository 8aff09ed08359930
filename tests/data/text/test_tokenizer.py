from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.shards.tar_writer import ShardWriter
from tests.data.text.rendering import assistant, sample, user
from vlm_train.data.text import tokenizer as tokenizers
from vlm_train.data.text.tokenizer import (
    byte_level,
    gguf,
    pretrained,
    word_tokenizer,
    words_from_shards,
)
from vlm_train.errors import AssetError, ConfigError


def test_byte_level_is_exact_and_stable() -> None:
    tokenizer = byte_level(add=["<new>"])
    text = "Ünï ✓\t<x>\n 12"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<bos>", "<eos>", "<unk>"]) == [0, 1, 2, 3]
    assert tokenizer.convert_tokens_to_ids("<new>") == len(tokenizer) - 1 == len(byte_level())
    assert tokenizer.get_vocab() == byte_level(add=["<new>"]).get_vocab()


def test_words_are_ordered_by_frequency_then_alphabet() -> None:
    tokenizer = word_tokenizer(["Is it teal? yes", "is it red? no", "is it?"])
    ranked = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    assert ranked == ["<pad>", "<bos>", "<eos>", "<unk>", "?", "is", "it", "no", "red", "teal", "yes"]
    for word in ("yes", "no", "teal"):
        assert tokenizer.decode(tokenizer(word.upper(), add_special_tokens=False).input_ids) == word
    assert tokenizer("blue", add_special_tokens=False).input_ids == [tokenizer.unk_token_id]
    kept = word_tokenizer(["a a b b c"], min_count=2, max_words=1)
    assert set(kept.get_vocab()) == {"<pad>", "<bos>", "<eos>", "<unk>", "a"}
    assert "Is" in word_tokenizer(["Is"], lowercase=False).get_vocab()


def test_words_read_every_turn_of_the_shards(tmp_path) -> None:
    with ShardWriter(tmp_path / "set") as writer:
        writer.write_sample(sample((user("A b"), assistant("c")), (user("a"), assistant("d"))), [])
    tokenizer = words_from_shards(shards=str(tmp_path / "set"))
    assert tokenizer.get_vocab() == word_tokenizer(["a b", "c", "a", "d"]).get_vocab()
    with ShardWriter(tmp_path / "other") as writer:
        writer.write_sample(sample((user("d"), assistant("e"))), [])
    tokenizer = words_from_shards(shards=[str(tmp_path / "set"), str(tmp_path / "other")])
    assert tokenizer.get_vocab() == word_tokenizer(["a b", "c", "a", "d", "d", "e"]).get_vocab()
    with pytest.raises(AssetError, match=r"tokenizer\.shards: .*missing"):
        words_from_shards(shards=str(tmp_path / "missing"))


def test_saved_tokenizer_loads_again(tmp_path) -> None:
    word_tokenizer(["yes no"], add=["<im_start>"]).save_pretrained(tmp_path)
    again = pretrained(name=str(tmp_path), add=["<im_end>"])
    assert again.get_vocab() == word_tokenizer(["yes no"], add=["<im_start>", "<im_end>"]).get_vocab()
    assert (again.bos_token, again.eos_token) == ("<bos>", "<eos>")


def test_missing_tokenizers_name_the_setting(tmp_path) -> None:
    with pytest.raises(AssetError, match=r"tokenizer\.name: null"):
        pretrained(name=None)
    with pytest.raises(AssetError, match=r"tokenizer\.name: no tokenizer could be loaded from"):
        pretrained(name=str(tmp_path))
    with pytest.raises(AssetError, match=r"tokenizer\.file: .* is not a file"):
        gguf(file=str(tmp_path / "a.gguf"))
    with pytest.raises(AssetError, match=r"tokenizer\.file"):
        pretrained(name=str(tmp_path / "a.gguf"))


@pytest.mark.parametrize("damage", ["5", "[]", "[" * 100_000, "rstrip", "added_tokens", "model"])
def test_a_damaged_tokenizer_is_one_error_of_the_setting(damage: str, tmp_path: Path) -> None:
    """What the libraries raise for these is TypeError, AttributeError, RecursionError and Exception itself."""
    byte_level().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    whole = json.loads(path.read_text(encoding="utf-8"))
    if damage == "rstrip":
        del whole["added_tokens"][0]["rstrip"]
    elif damage in whole:
        whole[damage] = "x"
    path.write_text(json.dumps(whole) if damage.isalpha() or "_" in damage else damage, encoding="utf-8")
    with pytest.raises(
        AssetError, match=r"tokenizer\.name: no tokenizer could be loaded from .*: .+ Give a local folder"
    ):
        pretrained(name=str(tmp_path))


def test_berts_own_tokens_begin_and_end_a_text(tmp_path: Path) -> None:
    from transformers import BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat"]
    BertTokenizerFast(vocab={word: i for i, word in enumerate(words)}).save_pretrained(tmp_path)
    found = pretrained(name=str(tmp_path))
    assert (found.bos_token, found.eos_token) == ("[CLS]", "[SEP]")
    assert found("a cat", add_special_tokens=False).input_ids == [5, 6]


GOLDEN = Path(__file__).parent / "golden"


def only_a_sentencepiece_model(folder: Path, **settings: Any) -> Path:
    """A tokenizer as Vicuna ships it. `spaces.model` has what LLaMA's vocabulary has: runs of spaces with low ids and
    the lowest scores."""
    shutil.copy(GOLDEN / "spaces.model", folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **settings}))
    return folder


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "case", json.loads((GOLDEN / "spaces.json").read_text(encoding="utf-8")), ids=lambda c: c["text"]
)
def test_a_sentencepiece_model_gives_the_ids_of_sentencepiece(case: Any, legacy: bool, tmp_path: Path) -> None:
    """`spaces.json` is what the library sentencepiece 0.2.3 gave, for runs of spaces and indented code among others."""
    pytest.importorskip("sentencepiece")
    tokenizer = pretrained(name=str(only_a_sentencepiece_model(tmp_path, legacy=legacy)))
    encoding = tokenizer.backend_tokenizer.encode(case["text"], add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(encoding.ids) == case["pieces"]
    assert encoding.ids == case["ids"]
    assert tokenizer.decode(encoding.ids) == case["text"]
    assert encoding.offsets[-1][1] == len(case["text"]), "labels need them"
    tokenizer.save_pretrained(tmp_path / "saved")
    again = pretrained(name=str(tmp_path / "saved")).backend_tokenizer
    assert again.encode(case["text"], add_special_tokens=False).ids == case["ids"]


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = only_a_sentencepiece_model(tmp_path)
    monkeypatch.setattr(tokenizers, "find_spec", lambda name: None)
    with pytest.raises(AssetError) as error:
        pretrained(name=str(folder))
    assert "holds tokenizer.model but no tokenizer.json" in str(error.value)
    assert "pip install sentencepiece" in str(error.value) and "tiktoken" not in str(error.value)


def test_added_tokens_may_begin_behind_a_padded_table(tmp_path: Path) -> None:
    """As `build_tokenizer` of github.com/allenai/molmo2: unused tokens fill the rows between."""
    byte_level().save_pretrained(tmp_path)
    size = len(byte_level())
    found = pretrained(name=str(tmp_path), add=["<im_patch>", "<im_col>"], first=size + 7)
    assert found.convert_tokens_to_ids(["<im_patch>", "<im_col>"]) == [size + 7, size + 8] and len(found) == size + 9
    with pytest.raises(ConfigError, match=rf"tokenizer\.first: 5; allowed: {size} or more"):
        pretrained(name=str(tmp_path), first=5)
