"""What single settings may be: words among known ones, numbers within bounds. `*` stands for every name or index."""

from __future__ import annotations

from typing import Any

LITERALS: dict[str, tuple[Any, ...]] = {
    "mode": ("fit", "eval", "caption", "score", "export", "show", "lengths", "import", "config"),
    "batch.normalize": ("token", "sample", "source", "sqrt_length"),
    "trainer.precision": ("32-true", "bf16-mixed", "bf16-true", "16-mixed"),
    "trainer.accelerator": ("auto", "cpu", "gpu"),
    "trainer.activation_checkpointing": ("none", "full", "selective"),
    "launch.kind": ("local", "torchrun", "srun"),
    "init_from.*.which": ("last", "best"),
    "reference.which": ("last", "best"),
    "reference.init_from.*.which": ("last", "best"),
    "columns.which": ("last", "best"),
    "trainer.guard.random_frozen": ("refuse", "warn", "allow"),
}

POSITIVE = (
    "batch.samples", "batch.tokens", "batch.micro", "trainer.max_steps", "trainer.val_every",
    "trainer.save_every", "trainer.log_every", "launch.devices", "launch.nodes",
)  # fmt: skip

RANGES: dict[str, str] = {
    "seed": ">= 0",
    "trainer.epochs": "> 0, <= 1e6",
    "trainer.peak_tflops": "> 0, <= 1e6",
    "optim.lr": ">= 0, <= 1000",
    "optim.betas.*": ">= 0, < 1",
    "optim.eps": "> 0, <= 1",
    "optim.momentum": ">= 0, < 1",
    "optim.weight_decay": ">= 0, <= 1000",
    "params.rules.*.lr": ">= 0, <= 1000",
    "params.rules.*.weight_decay": ">= 0, <= 1000",
    "params.rules.*.layer_decay": "> 0, <= 1",
    "params.rules.*.warmup_steps": ">= 0",
    "lr_schedule.warmup_ratio": ">= 0, <= 1",
    "lr_schedule.warmup_steps": ">= 0",
    "lr_schedule.min_ratio": ">= 0, <= 1",
    "lr_schedule.start_ratio": ">= 0, <= 1",
    "lr_schedule.factor": "> 0, <= 1",
    "trainer.threads": ">= 1",
    "columns.batch": ">= 1",
    "columns.max_new_tokens": ">= 1",
    "columns.min_new_tokens": ">= 0",
    "columns.part": ">= 0",
    "columns.parts": ">= 1",
    "columns.temperature": ">= 0, <= 1000",
    "columns.top_p": "> 0, <= 1",
    "columns.repetition_penalty": "> 0, <= 10",
    "trainer.keep_last": ">= 1",
    "trainer.keep_best": ">= 0",
    "trainer.keep_every": ">= 1",
    "trainer.guard.spike": "> 0, <= 1e6",
    "trainer.guard.window": ">= 2",
    "trainer.guard.max_in_a_row": ">= 0",
    "trainer.guard.rollback": ">= 0",
    "trainer.guard.max_unknown": ">= 0, <= 1",
    "trainer.watchdog_minutes": "> 0, <= 1e6",
    "trainer.min_supervised_ratio": ">= 0, <= 1",
    "trainer.max_bad_samples": ">= 0",
    "trainer.max_bad_share": ">= 0, <= 1",
    "trainer.max_grad_norm": "> 0, <= 1e6",
    "launch.timeout_minutes": "> 0, <= 1e6",
    "data.train.*.samples": ">= 1",
    "data.val.*.samples": ">= 1",
    "data.train.*.limit": ">= 1",
    "data.val.*.limit": ">= 1",
    "data.train.*.loss_weight": ">= 0, <= 1e6",
    "data.val.*.loss_weight": ">= 0, <= 1e6",
    "data.train.*.repeat": "> 0, <= 1e6",
    "data.train.*.weight": "> 0",
    "data.train.*.share": "> 0, < 1",
    "data.shard_cache_bytes": ">= 1",
    "data.temperature": "> 0, <= 1e6",
    "data.block_samples": ">= 1",
    "data.shuffle_buffer_shards": ">= 1",
    "data.pack": ">= 1",
    "data.pack_patches": ">= 1",
    "data.limit": ">= 1",
    "data.val_limit": ">= 1",
    "data.val_share": ">= 0, < 1",
    "data.max_length": ">= 1",
    "data.workers": ">= 0",
    "data.prefetch": ">= 1",
    "model.embed_dim": ">= 1",
    "model.init_temperature": "> 0, <= 1e6",
    "model.max_scale": "> 0, <= 1e9",
    "connector.depth": ">= 1",
    "connector.pool": ">= 1",
    "objective.*.weight": ">= 0, <= 1e6",
    "objective.*.chunk": ">= 1",
    "objective.*.label_smoothing": ">= 0, <= 1",
    "instruction.max_length": ">= 1",
    "tokenizer.min_count": ">= 1",
    "tokenizer.max_words": ">= 1",
    "peft.rank": ">= 1",
    "peft.alpha": "> 0, <= 1e6",
    "peft.dropout": ">= 0, < 1",
    "eval.*.limit": ">= 1",
    "eval.*.batch": ">= 1",
    "eval.*.max_new_tokens": ">= 1",
    "target.gpus": ">= 1",
    "target.gpus_per_node": ">= 1",
    "target.cpu_gib": "> 0, <= 1e6",
    "target.memory_gib": "> 0, <= 1e6",
    "target.image_width": ">= 1",
    "target.image_height": ">= 1",
    "target.text_tokens": ">= 1",
    "target.supervised_tokens": ">= 1",
}
"""Setting -> what its number must fulfil; `*` stands for every name or index. Absent and null ones are skipped."""
for _part in ("llm", "vision", "vision.*"):  # with 0 layers, or a negative base, transformers builds a model, too
    RANGES |= {f"{_part}.config.{name}": ">= 1" for name in (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "max_position_embeddings", "vocab_size",
    )}  # fmt: skip
    RANGES |= {f"{_part}.config.{name}": "> 0, < 1" for name in ("rms_norm_eps", "layer_norm_eps")}
    RANGES |= {f"{_part}.config.{name}": "> 0, <= 1e12" for name in ("rope_theta", "rope_parameters.rope_theta")}


NAMES = (
    "data.cache", "data.shard_cache", "data.train.*.shards", "data.val.*.shards", "data.train.*.columns",
    "data.val.*.columns", "columns.shards", "columns.output", "columns.captions", "eval.*.shards", "init_from.*.run",
    "reference.model", "vision.weights", "llm.weights", "model.weights", "tokenizer.name", "tokenizer.file",
)  # fmt: skip
"""Settings that name files, folders or models, and must not be empty; null leaves out those that may be."""
