"""Tokenizers by configuration: each function returns a fast `transformers` tokenizer (labels need its offsets)."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_train.config.package_files import resolve_package_file
from vlm_train.errors import AssetError, ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MODEL_FILE = "tokenizer.model"
"""A sentencepiece model (Vicuna, Llama-2) or, less often, a tiktoken file."""

SENTENCEPIECE = ("sentencepiece", "google.protobuf")
"""What `transformers` reads a sentencepiece model with."""

COMMON_SPECIALS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<im_start>",
    "<im_end>",
    "<Img>",
    "</Img>",
)
"""Special tokens of `byte_level`, so that every shipped template and layout works with it."""

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def pretrained(*, name: str | None, add: Sequence[str] = (), first: int | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer of a local folder, a hub repository or a `.gguf` file.

    Args:
        name: what to load.
        add: further special tokens (such as the boundary tokens of a media layout), put at the end of the vocabulary.
        first: the id of the first of them, behind a table with more rows than the vocabulary has words; null: the next.

    Raises:
        AssetError: it cannot be had. ConfigError: it has no fast version, or `first` is the id of a word.
    """
    if name is None:
        raise AssetError(
            "tokenizer.name: null; name a folder, a hub repository or a .gguf file, or choose tokenizer=byte_level"
        )
    if name.endswith(".gguf"):
        return gguf(file=name, add=add)
    tokenizer = load_tokenizer("tokenizer.name", name)
    if first is not None:
        if first < (size := len(tokenizer)):
            raise ConfigError(f"tokenizer.first: {first}; allowed: {size} or more, the vocabulary's size, or null")
        _add_tokens(tokenizer, [f"<|unused_{number}|>" for number in range(size, first)])
    return _add_tokens(tokenizer, add)


def gguf(*, file: str, add: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """The tokenizer inside a GGUF file (a path, or `package:<package>/<file>`). `add`, errors: as in `pretrained`."""
    path = Path(resolve_package_file(file))
    if not path.is_file():
        raise AssetError(f"tokenizer.file: {file!r} is not a file")
    return _add_tokens(load_tokenizer("tokenizer.file", str(path.parent), gguf_file=path.name), add)


def load_tokenizer(setting: str, name: str, **options: str) -> Any:
    """The fast tokenizer `name`, with nothing cut or padded; `setting` named it. Raises as `pretrained` does."""
    from transformers import AutoTokenizer

    if _holds_only_sentencepiece(name) and (missing := [one for one in SENTENCEPIECE if find_spec(one) is None]):
        raise AssetError(
            f"{setting}: {name!r} holds {MODEL_FILE} but no tokenizer.json, and reading it needs packages that are not "
            f"installed: pip install {' '.join(one.removeprefix('google.') for one in missing)}"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except Exception as error:  # a damaged file raises anything, the Rust library even Exception itself
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise AssetError(
            f"{setting}: no tokenizer could be loaded from {name!r}: {reason}. "
            "Give a local folder that holds tokenizer.json, or download it first"
        ) from error
    if not tokenizer.is_fast:
        raise ConfigError(f"{setting}: {name!r} has no fast tokenizer, and labels need its character offsets")
    if tokenizer.bos_token is None and tokenizer.eos_token is None and tokenizer.cls_token is not None:
        tokenizer.bos_token, tokenizer.eos_token = tokenizer.cls_token, tokenizer.sep_token  # BERT's begin and end
    tokenizer = _follow_sentencepiece(tokenizer)
    core = tokenizer.backend_tokenizer  # which `render` calls directly
    core.no_truncation()  # some files ask for either; length is the business of data.max_length
    core.no_padding()
    core.encode_special_tokens = tokenizer.split_special_tokens
    return tokenizer


def _holds_only_sentencepiece(name: str) -> bool:
    """Whether `name` is a folder whose only tokenizer is a sentencepiece model, as Vicuna's are."""
    folder = Path(name)
    return (folder / MODEL_FILE).is_file() and not (folder / "tokenizer.json").is_file()


def _follow_sentencepiece(tokenizer: Any) -> Any:
    """A tokenizer that was read from a sentencepiece BPE model, with that model's ids; any other as it is.

    `transformers` 5 differs in two ways, both in runs of spaces. It orders merges by id, and the runs in LLaMA's
    vocabulary have low ids but the lowest scores: "a  b" is `▁a ▁ ▁b`, not `▁a ▁▁ b`. And it puts no space before a
    text that begins with one. The class of the model's family would do both again when it is read from its own files.
    """
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import Metaspace, Sequence
    from transformers import PreTrainedTokenizerFast

    core, file = tokenizer.backend_tokenizer, str(getattr(tokenizer, "vocab_file", None) or "")
    if not isinstance(core.model, BPE) or Path(file).name != MODEL_FILE or not Path(file).is_file():
        return tokenizer
    from sentencepiece import SentencePieceProcessor

    pieces, state = SentencePieceProcessor(model_file=file), json.loads(core.to_str())
    model, scores = state["model"], [pieces.get_score(index) for index in range(pieces.get_piece_size())]
    vocab = {pieces.id_to_piece(index): index for index in range(len(scores))}
    if any(model["vocab"].get(piece) != index for piece, index in vocab.items()):
        return tokenizer  # a class that numbers the pieces anew has merges of its own
    merges = sorted((tuple(pair) for pair in model["merges"]), key=lambda pair: -scores[vocab["".join(pair)]])
    names = ("unk_token", "fuse_unk", "byte_fallback")
    core.model = BPE(vocab=model["vocab"], merges=merges, **{name: model[name] for name in names})
    before = state["pre_tokenizer"] or {}
    if before.get("type") == "Metaspace" and before["prepend_scheme"] != "never":
        spaces = Metaspace("▁", prepend_scheme="never", split=False)
        lead = Metaspace(" ", prepend_scheme=before["prepend_scheme"], split=False)  # sees no space: always adds one
        core.pre_tokenizer = Sequence([spaces, lead, spaces])
    kept = ("model_max_length", "padding_side", "truncation_side", "chat_template", "clean_up_tokenization_spaces")
    options = {name: getattr(tokenizer, name) for name in kept}
    return PreTrainedTokenizerFast(tokenizer_object=core, **options, **tokenizer.special_tokens_map)


def byte_level(*, add: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """One token a byte, plus special tokens: deterministic, needs no file, encodes anything. For tests and `size=tiny`.

    Ids: 0-3 are <pad> <bos> <eos> <unk>, then the 256 bytes, then `COMMON_SPECIALS` and `add`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = ["<pad>", "<bos>", "<eos>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = _add_tokens(_wrap_tokenizer(core), COMMON_SPECIALS)
    tokenizer.chat_template = CHATML
    return _add_tokens(tokenizer, add)


def words_from_shards(
    *,
    shards: str | Sequence[str],
    lowercase: bool = True,
    min_count: int = 1,
    max_words: int | None = None,
    add: Sequence[str] = (),
) -> PreTrainedTokenizerFast:
    """One token a word, the vocabulary taken from the texts of a shard set, or of several.

    Words are split at white space and punctuation and ordered by frequency, then alphabet, so that the same shards give
    the same ids. Ids 0-3 are <pad> <bos> <eos> <unk>.

    Args:
        shards: folder of the shard set (normally the training one), or a list of folders.
        min_count: rarer words become <unk>.
        max_words: keep only that many words; null: all.

    Raises:
        AssetError: `shards` holds no complete shard set.
    """
    from data_pipelines.errors import DataError
    from data_pipelines.shards.shard_set import ShardSet

    try:
        sets = [ShardSet(folder) for folder in ([shards] if isinstance(shards, str) else shards)]
    except DataError as error:
        raise AssetError(f"tokenizer.shards: {error}") from error
    texts = (
        turn.text
        for shard_set in sets
        for index in range(len(shard_set))
        for annotation in shard_set.read_sample(index).annotations
        for turn in annotation.turns
    )
    return word_tokenizer(texts, lowercase=lowercase, min_count=min_count, max_words=max_words, add=add)


def word_tokenizer(
    texts: Iterable[str],
    *,
    lowercase: bool = True,
    min_count: int = 1,
    max_words: int | None = None,
    add: Sequence[str] = (),
) -> PreTrainedTokenizerFast:
    """The word-level tokenizer of `texts`; see `words_from_shards`."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    pre_tokenizer = pre_tokenizers.Whitespace()
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(word for word, _ in pre_tokenizer.pre_tokenize_str(text.lower() if lowercase else text))
    ranked = sorted((-count, word) for word, count in counts.items() if count >= min_count)[:max_words]
    vocabulary = ["<pad>", "<bos>", "<eos>", "<unk>", *(word for _, word in ranked)]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizer
    if lowercase:
        core.normalizer = normalizers.Lowercase()
    return _add_tokens(_wrap_tokenizer(core), add)


def _wrap_tokenizer(core: Any) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def _add_tokens(tokenizer: PreTrainedTokenizerFast, add: Sequence[str]) -> PreTrainedTokenizerFast:
    new = [token for token in add if token not in tokenizer.get_vocab()]
    if new:
        tokenizer.add_tokens(new, special_tokens=True)
    return tokenizer


def hash_vocabulary(tokenizer: Any) -> str:
    """Fingerprint of what every id means."""
    words = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()


def find_unknown_id(tokenizer: Any) -> int | None:
    """The id that stands for text outside the vocabulary; None without one, or where it also ends a text, as GPT-2's
    does, whose bytes spell everything."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    ends = (getattr(tokenizer, "eos_token_id", None), getattr(tokenizer, "bos_token_id", None))
    return None if unknown is None or unknown in ends else int(unknown)


def library(*, name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a whole model's processor, with the model's chat template.

    Args:
        name: a local folder or a hub name.

    Raises:
        AssetError: it has no processor that can be loaded. ConfigError: the tokenizer has no fast version.
    """
    from vlm_train.models.hf_vlm.processor import load_processor, prepare_tokenizer

    return prepare_tokenizer(load_processor(resolve_package_file(name)))
