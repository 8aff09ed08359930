"""What the model answers to the same few held-out samples, validation after validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch.distributed.tensor import DTensor

from data_pipelines.errors import BadSample
from vlm_train.contracts.batch import Batch
from vlm_train.contracts.family import Family, Generates
from vlm_train.data.collate import collate_prompts
from vlm_train.data.dataset import Samples
from vlm_train.data.images.plan import MediaViews, collect_pictures
from vlm_train.data.processor import Processor
from vlm_train.data.show import save_views
from vlm_train.data.text.render import RenderOptions, TokenizedSample
from vlm_train.errors import ConfigError
from vlm_train.evaluation.common import evaluation_mode
from vlm_train.evaluation.generate import question_text
from vlm_train.evaluation.predictions import spread
from vlm_train.loggers.metrics_logger import ImageSample, MetricsLogger
from vlm_train.runs import record
from vlm_train.runs.folder import RunFolder


@dataclass(frozen=True)
class Asked:
    """A held-out sample: its last question and answer, and its picture (a path inside the folder, or None)."""

    key: str
    question: str
    reference: str
    image: str | None


class Predictions(pl.Callback):
    """Writes `predictions/step-XXXXXXXX.json` and pictures into the run folder at every validation, on rank 0.

    Does nothing without a validation set, for a family that cannot generate, and where ranks hold parts of parameters.

    Args:
        samples: held-out samples asked, spread evenly over the validation set; the first question of each.
        max_new_tokens: most tokens of an answer.
    """

    def __init__(self, *, samples: int = 4, max_new_tokens: int = 48) -> None:
        if samples < 1 or max_new_tokens < 1:
            raise ConfigError(
                f"callbacks.predictions: samples and max_new_tokens must be positive, got {samples}, {max_new_tokens}"
            )
        self.samples, self.max_new_tokens = samples, max_new_tokens
        self.asked: list[Asked] | None = None
        self.batch: Batch | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Drop the answers after the step that the run goes on from: they will be written again."""
        if trainer.is_global_zero:
            for path in _predictions_folder(trainer).glob("step-*.json"):
                if path.stem > f"step-{trainer.global_step:08d}":
                    path.unlink()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero or self.asked == []:
            return
        held_out: Samples = trainer.datamodule.val  # type: ignore[attr-defined]
        model: Family = pl_module.model  # type: ignore[assignment]
        if not len(held_out) or not isinstance(model, Generates) or any(map(_is_part, model.parameters())):
            return
        try:
            if self.asked is None:
                self._render_questions(held_out, _predictions_folder(trainer))
            if self.asked:
                self._log_answers(trainer, self._generate_answers(held_out.processor, model))
        except Exception as error:  # a run is worth more than its samples
            print(f"callbacks.predictions: none any more: {type(error).__name__}: {error}", flush=True)
            self.asked = []

    def _render_questions(self, held_out: Samples, folder: Path) -> None:
        """Render the questions and save their pictures; unusable samples are passed over."""
        prompts: list[tuple[TokenizedSample, MediaViews]] = []
        self.asked, processor = [], held_out.processor
        for index in spread(range(len(held_out)), self.samples):
            source, number, _ = held_out.locate_sample(index)
            try:
                sample, blobs = source.shards.load_sample(number)
                prompt = processor.render(sample, RenderOptions(annotations="first", annotation=0, generation=True))
                views = processor.make_views(blobs, media=sample.media)
            except BadSample:
                continue
            pictures = collect_pictures(views)
            image = f"images/{len(prompts)}.png" if pictures else None
            if image:
                save_views(pictures, folder / image)
            prompts.append((prompt, views))
            self.asked.append(Asked(sample.key, question_text(sample.annotations[0]), prompt.reference, image))
        self.batch = collate_prompts(prompts, processor.images) if prompts else None

    def _generate_answers(self, processor: Processor, model: Any) -> list[str]:
        assert self.batch is not None
        with evaluation_mode(model):
            batch = self.batch.to(next(model.parameters()).device)
            ids = model.generate(batch, max_new_tokens=self.max_new_tokens, eos_ids=processor.end_ids)
        return [processor.decode_answer(row).strip() for row in ids.tolist()]

    def _log_answers(self, trainer: pl.Trainer, answers: Sequence[str]) -> None:
        assert self.asked is not None
        step, folder = trainer.global_step, _predictions_folder(trainer)
        rows = [asdict(one) | {"prediction": text} for one, text in zip(self.asked, answers, strict=True)]
        record.write_json(folder / f"step-{step:08d}.json", rows)
        pictures = [
            ImageSample(folder / one.image, f"{one.question}\nanswer: {text}\nreference: {one.reference}")
            for one, text in zip(self.asked, answers, strict=True)
            if one.image
        ]
        for logger in trainer.loggers:
            if isinstance(logger, MetricsLogger):
                logger.log_images(step, pictures)


def _predictions_folder(trainer: pl.Trainer) -> Path:
    return RunFolder(trainer.default_root_dir).predictions


def _is_part(parameter: Any) -> bool:
    """Whether this rank holds only a part of it (FSDP2, ZeRO-3): then one rank alone cannot run the model."""
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")
