"""`mode=caption` and `mode=score`: what a run's model says of a shard set, as columns that `data_pipelines` filters by.

What it says of pairs of answers, which training reads, is in `score_answers`.

A shard is the unit of work: after an interruption the same command goes on with those that have no columns yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from data_pipelines.capfilt import with_caption
from data_pipelines.errors import BadSample
from data_pipelines.sample import Sample
from data_pipelines.shards.columns import Columns, ColumnWriter
from data_pipelines.shards.shard_set import ShardSet
from vlm_train.config.resolve import resolve_key
from vlm_train.config.run_identity import run_dir
from vlm_train.contracts.family import AlignsPairs, Generates, MatchesPairs, missing_members
from vlm_train.data.text.render import RenderOptions, TokenizedSample
from vlm_train.errors import ConfigError
from vlm_train.evaluation.common import Unusable, evaluation_mode, progress_bar
from vlm_train.evaluation.run import require_own_weights
from vlm_train.seeds import derive_seed

if TYPE_CHECKING:
    from vlm_train.build import Assembly
    from vlm_train.contracts.batch import Batch
    from vlm_train.data.images.plan import MediaViews
    from vlm_train.data.processor import Processor

    Row = dict[str, Any]


@dataclass(frozen=True)
class Shown:
    """A usable sample: its key, its media as the model sees them, and its prompt, or every text that is scored."""

    key: str
    views: MediaViews
    texts: list[TokenizedSample]


SEEN = ("template", "image")
"""Groups that, besides the weights and `columns`, decide what the model says."""

RENDERED = ("annotations", "max_length", "over_length")
"""Settings of `data` that decide which tokens an answer has."""

SAMPLING = {"temperature": 0.0, "top_p": 1.0, "repetition_penalty": 1.0, "min_new_tokens": 0}
"""Options of `generate`, of which a model gets those that change what it does anyway."""


def write_captions(cfg: DictConfig) -> dict[str, Any]:
    """Write a new caption for every sample into the column `caption`; it continues the template's prompt."""
    given = {name: cfg.columns[name] for name in SAMPLING if cfg.columns[name] != SAMPLING[name]}
    given["max_new_tokens"] = cfg.columns.max_new_tokens

    def render_prompts(processor: Processor, sample: Sample) -> list[TokenizedSample]:
        return [processor.render(sample, RenderOptions(annotations="first", generation=True))]

    def caption_rows(assembly: Assembly, shown: Sequence[Shown]) -> list[Row]:
        model, processor = require_methods(assembly, (Generates,), cfg.mode), assembly.processor
        batch = _collate_items(assembly, [(one.texts[0], one.views) for one in shown])
        ids = model.generate(batch, eos_ids=processor.end_ids, **given)
        found = [processor.decode_answer(row) for row in ids.tolist()]
        return [{"key": one.key, "caption": text.strip()} for one, text in zip(shown, found, strict=True)]

    about = {"seed": cfg.seed, **given}
    return write_columns(cfg, ("caption",), about, partial(_show_caption, render_prompts), caption_rows)


def score_captions(cfg: DictConfig) -> dict[str, Any]:
    """Write what the model thinks of every caption, those of `columns.captions` in place of the samples' own: `match`,
    the probability that its ITM head gives a match, and `similarity`, the cosine that ITC learns."""

    def render_captions(processor: Processor, sample: Sample) -> list[TokenizedSample]:
        first = RenderOptions(annotations="first", max_length=processor.max_length, over_length="truncate")
        return [processor.render(sample, replace(first, annotation=n)) for n in range(len(sample.annotations))]

    def score_rows(assembly: Assembly, shown: Sequence[Shown]) -> list[Row]:
        model = require_methods(assembly, (AlignsPairs, MatchesPairs), cfg.mode)
        found: list[Row] = [{"key": one.key, "match": [], "similarity": []} for one in shown]
        pairs = [(row, text, one.views) for row, one in zip(found, shown, strict=True) for text in one.texts]
        for start in range(0, len(pairs), cfg.columns.batch):
            some = pairs[start : start + cfg.columns.batch]
            scores = _score_pairs(model, _collate_items(assembly, [(text, views) for _, text, views in some]))
            for (row, _, _), match, similarity in zip(some, *scores, strict=True):
                row["match"].append(match)
                row["similarity"].append(similarity)
        return found

    return write_columns(cfg, ("match", "similarity"), {}, partial(_show_caption, render_captions), score_rows)


def _score_pairs(model: Any, batch: Batch) -> tuple[list[float], list[float]]:
    """Match probabilities and cosines of the pairs of a batch."""
    import torch

    text = batch.text["llm"]
    logits = model.match(model.image_keys_values(batch), text.ids, text.segment_ids != 0)
    cosines = torch.einsum("bqe,be->bq", model.image_vectors(batch), model.text_vectors(batch)).amax(dim=1)
    return logits.float().softmax(dim=-1)[:, 1].tolist(), cosines.float().tolist()


def _show_caption(
    texts: Callable[[Processor, Sample], list[TokenizedSample]],
    processor: Processor,
    sample: Sample,
    blobs: Sequence[bytes],
) -> Shown:
    """A sample that is one image with captions. Raises `BadSample` for others."""
    if len(sample.media) != 1 or sample.media[0].kind != "image":
        raise BadSample(f"{len(sample.media)} media items; a caption is about one image", kind="media")
    return Shown(sample.key, processor.make_views(blobs, media=sample.media), texts(processor, sample))


def write_columns(
    cfg: DictConfig,
    names: Sequence[str],
    about: dict[str, Any],
    show: Callable[[Processor, Sample, Sequence[bytes]], Shown],
    rows: Callable[[Assembly, Sequence[Shown]], list[Row]],
    store: Callable[[Path, int, list[Row]], list[Row]] | None = None,  # writes what no line can hold -> the lines
) -> dict[str, Any]:
    """Write the columns `names` of all shards that have none: `show` makes every sample ready, `rows` scores some.

    Args:
        about: what the values depend on besides the run, its weights, template and image plan.
    """
    from vlm_train.build import build_assembly
    from vlm_train.checkpoint.weights import load_run_weights

    folder, shards, output = run_dir(cfg), ShardSet(cfg.columns.shards), output_of(cfg)
    require_own_weights(cfg, folder)
    taken = cfg.columns.captions
    captions = Columns(taken, shards, ["caption"], option="columns.captions") if taken else None
    about = {
        "mode": cfg.mode,
        "captions": captions.sha256 if captions else None,
        **about,
        **_describe_model(cfg, folder),
    }
    writer = ColumnWriter(output, shards, names, about)
    missing = [shard for shard in writer.missing_shards if shard % cfg.columns.parts == cfg.columns.part]
    if missing:
        assembly = build_assembly(cfg)
        load_run_weights(assembly.model, cfg.init_from, folder, cfg.columns.which)
        _to_device(assembly, cfg)
        unusable, step = Unusable(shards), progress_bar("samples", len(shards))
        with evaluation_mode(assembly.model):
            for shard in missing:
                _seed_generation(derive_seed(cfg.seed, "columns", shard))
                found: list[Row] = []
                prepare = partial(show, assembly.processor)
                for shown in _group_samples(shards, shard, captions, prepare, cfg.columns.batch, unusable):
                    found += rows(assembly, shown)
                    step(len(shown))
                writer.write_rows(shard, store(output, shard, found) if store else found)
        unusable.require_usable(len(shards))
    if left := len(writer.missing_shards):
        print(f"{output}: {left} shards are left to other parts, whose last finishes the columns", flush=True)
    else:
        writer.write_manifest()
        before = "" if missing else ", made before"
        print(f"{output}: {', '.join(names)} of {len(shards):,} samples{before}", flush=True)
    return {"columns": str(output)}


def output_of(cfg: DictConfig) -> Path:
    """Where the columns go: `columns.output`, or beside the set. Raises `ConfigError` if nothing can be beside it."""
    columns = cfg.columns
    if columns.output:
        return Path(columns.output)
    if "://" in columns.shards:
        raise ConfigError(f"columns.output is missing: {columns.shards} is remote, so columns need a folder.")
    name = f"score-{Path(columns.captions).name}" if columns.captions else cfg.mode
    if cfg.mode == "score" and columns.scores != "captions":
        name = columns.scores
    return Path(f"{columns.shards.rstrip('/')}.columns") / name


def _describe_model(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """The other settings that the values depend on."""
    from vlm_train.checkpoint.files import hash_file
    from vlm_train.checkpoint.weights import weights_file

    return {
        "run": folder.name,
        "weights": hash_file(weights_file(folder, cfg.columns.which)),
        "batch": cfg.columns.batch,
        **{group: resolve_key(cfg, group) for group in SEEN},
    }


def require_methods(assembly: Assembly, needs: tuple[type, ...], mode: str) -> Any:
    """The model, which offers all of `needs`."""
    if missing := [name for protocol in needs for name in missing_members(assembly.model, protocol)]:
        raise ConfigError(
            f"mode={mode}: needs model.{', model.'.join(missing)}, which {type(assembly.model).__name__} does not "
            "have. Choose a run of another model, such as model=blip."
        )
    return assembly.model


def _to_device(assembly: Assembly, cfg: DictConfig) -> None:
    import torch

    if torch.cuda.is_available() and cfg.trainer.accelerator != "cpu":
        assembly.model.to("cuda")


def _seed_generation(seed: int) -> None:
    import torch

    torch.manual_seed(seed)


def _group_samples(
    shards: ShardSet,
    shard: int,
    captions: Columns | None,
    prepare: Callable[[Sample, Sequence[bytes]], Shown],
    size: int,
    unusable: Unusable,
) -> Iterator[list[Shown]]:
    """The usable samples of a shard, at most `size` at a time, made ready with the captions that take their own's
    place."""
    first = int(shards.shard_starts[shard])
    group: list[Shown] = []
    for number in range(first, first + shards.manifest.shards[shard].samples):
        with unusable.catch_bad_sample(number):
            sample, blobs = shards.load_sample(number)
            if captions is not None:
                sample = with_caption(sample, str(captions.read_row(number).get("caption") or ""))
            group.append(prepare(sample, blobs))
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _collate_items(assembly: Assembly, items: Sequence[tuple[TokenizedSample, MediaViews]]) -> Batch:
    from vlm_train.data.collate import collate_prompts

    return collate_prompts(list(items), assembly.processor.images).to(next(assembly.model.parameters()).device)
