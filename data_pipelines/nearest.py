"""The known name that a wrong one most likely stands for. Both packages use this function."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_SAID = {
    "lr": "learning_rate base_lr max_lr peak_lr",
    "batch.samples samples": "batch_size global_batch_size train_batch_size bs",
    "batch.micro micro": "micro_batch_size per_device_train_batch_size per_device_batch_size per_gpu_batch_size",
    "batch.micro": "gradient_accumulation_steps grad_accum accumulate_grad_batches",
    "trainer.epochs epochs": "epoch num_epochs num_train_epochs max_epochs",
    "trainer.max_steps max_steps": "steps num_steps total_steps max_iters iterations",
    "trainer.max_grad_norm max_grad_norm": "grad_clip gradient_clip_val gradient_clipping clip_grad_norm max_norm",
    "trainer.precision precision": "bf16 fp16 amp dtype torch_dtype mixed_precision",
    "trainer.activation_checkpointing activation_checkpointing": "gradient_checkpointing grad_checkpointing",
    "trainer.save_every save_every": "save_steps save_interval",
    "trainer.log_every log_every": "logging_steps log_interval log_steps",
    "trainer.val_every val_every": "eval_steps eval_every val_steps val_interval",
    "trainer.keep_last keep_last": "save_total_limit",
    "trainer.accelerator accelerator": "device",
    "launch.devices devices": "gpus num_gpus n_gpu n_gpus nproc_per_node",
    "data.workers workers": "num_workers dataloader_num_workers num_proc processes jobs",
    "data.max_length max_length": "max_seq_length max_seq_len seq_len sequence_length model_max_length cutoff_len",
    "data.pack pack": "packing",
    "data.train source": "dataset dataset_name data_path train_data",
    "lr_schedule": "scheduler lr_scheduler",
    "lr_schedule.warmup_ratio warmup_ratio": "warmup",
    "weight_decay": "wd",
    "optim": "optimizer",
    "peft.rank rank": "r lora_r lora_rank",
    "peft.alpha alpha": "lora_alpha",
    "vision": "encoder image_encoder vision_tower vision_encoder backbone",
    "connector": "adapter projector mm_projector",
    "llm": "lm language_model decoder",
    "template": "chat_template conversation prompt",
    "objective": "criterion loss losses",
    "weights": "checkpoint pretrained model_name_or_path",
    "run_name": "name experiment experiment_name",
    "paths.runs output": "out out_dir output_dir save_dir",
    "resume": "resume_from_checkpoint",
    "limit": "max_samples num_samples",
    "folder file": "dir directory input input_dir path root",
}
SYNONYMS = {said: meant.split() for meant, saids in _SAID.items() for said in saids.split()}
"""What other programs call a setting -> what it may be called here, the likeliest first."""


def find_nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` most likely stands for: the same in other letters, a synonym, or one spelled alike.

    Names may be dotted; a synonym is looked for at the end of known ones, the shortest first.
    """
    known = sorted(known, key=lambda one: (one.count("."), one))
    last = name.rpartition(".")[2].lower().replace("-", "_")
    for meant in (last, *SYNONYMS.get(last, ())):
        for one in known:
            if one.lower() == meant or one.lower().endswith(f".{meant}"):
                return one
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return found[0] if found else None


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """` Did you mean x?`, or nothing."""
    near = find_nearest(name, known)
    return f" Did you mean {prefix}{near}?" if near else ""
