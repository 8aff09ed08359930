"""Writes `preference.safetensors` and `preference.json`: what TRL's `DPOTrainer` computes of a tiny Llama and 4 pairs.

TRL is not installed here; it and what it imports are put aside once, and nothing else reads them:

    pip install --target /tmp/trl_site --no-deps trl==1.16.0 accelerate datasets
    PYTHONPATH=.:/tmp/trl_site python tests/objectives/golden/make_preference.py

The loss is `DPOTrainer._compute_loss` itself, on batches of TRL's own collator; of the trainer there is only what that
method reads. A case is (loss_type, loss_weights, label_smoothing, the reference's log-likelihoods: the model's or 0).
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
import trl
from safetensors.torch import save_file
from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer
from trl.trainer.utils import add_fused_lm_head

CONFIG: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip
PAIRS = [
    {"prompt_ids": [1, 5, 6], "chosen_ids": [7, 8, 9, 2], "rejected_ids": [10, 2]},
    {"prompt_ids": [1, 11, 12, 13, 14], "chosen_ids": [15, 2], "rejected_ids": [16, 17, 18, 19, 20, 2]},
    {"prompt_ids": [1, 21], "chosen_ids": [22, 23, 2], "rejected_ids": [22, 24, 2]},
    {"prompt_ids": [1, 25, 26, 27], "chosen_ids": [28, 29, 30, 31, 32, 33, 2], "rejected_ids": [34, 35, 36, 2]},
]
BETA = 0.3
CASES: dict[str, tuple[list[str], list[float], float, bool]] = {
    "sigmoid": (["sigmoid"], [1.0], 0.0, True),
    "sigmoid_norm": (["sigmoid_norm"], [1.0], 0.0, True),
    "robust": (["robust"], [1.0], 0.1, True),
    "bco_pair": (["bco_pair"], [1.0], 0.0, True),
    "reference_free": (["sigmoid"], [1.0], 0.0, False),
    "onevision": (["sigmoid", "sft"], [1.0, 1.0], 0.0, True),
    "mpo": (["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0], 0.0, True),
    "smoothed": (["aot"], [1.0], 0.1, True),  # of one pair at a time: cDPO, which TRL's `sigmoid` no longer has
}
OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def make_model(seed: int) -> Any:
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**CONFIG))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6.0)  # so that likelihoods differ
    add_fused_lm_head(model, outputs=OUTPUTS)
    return model.eval()


def make_trainer(model: Any, reference: Any, case: str) -> Any:
    """What `_compute_loss` reads of a trainer."""
    trainer: Any = object.__new__(DPOTrainer)
    loss_types, loss_weights, smoothing, compares = CASES[case]
    same = dict.fromkeys(("gather", "gather_for_metrics"), lambda tensor: tensor)
    trainer.__dict__ |= {
        "model": model, "ref_model": reference, "beta": BETA, "loss_types": loss_types, "loss_weights": loss_weights,
        "label_smoothing": smoothing, "precompute_ref_logps": not compares, "ld_alpha": None, "use_weighting": False,
        "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 1.0, "aux_loss_enabled": False,
        "accelerator": SimpleNamespace(device=torch.device("cpu"), **same), "_total_train_tokens": 0, "_tp_size": 1,
        "args": SimpleNamespace(gradient_checkpointing_kwargs=None),
        "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)},
    }  # fmt: skip
    return trainer


def compute(case: str, reference: Any) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Loss and logged numbers of a case, and the gradients of every parameter."""
    model, collate = make_model(0), DataCollatorForPreference(pad_token_id=0)
    trainer = make_trainer(model, reference, case)
    batches = [[pair] for pair in PAIRS] if "aot" in CASES[case][0] else [PAIRS]
    total = 0.0
    for pairs in batches:
        batch = collate(pairs)
        if not CASES[case][3]:
            zeros = torch.zeros(len(pairs))
            batch |= {"ref_chosen_logps": zeros, "ref_rejected_logps": zeros}
        loss = trainer._compute_loss(model, batch, return_outputs=False) / len(batches)
        loss.backward()
        total += loss.item()
    logged = {name: sum(values) / len(values) for name, values in trainer._metrics["eval"].items() if "/" in name}
    return {"loss": total} | logged, {name: p.grad for name, p in model.named_parameters()}


def main() -> None:
    folder, reference = Path(__file__).parent, make_model(1)
    tensors = {f"weights.{name}": p.detach().clone() for name, p in make_model(0).named_parameters()}
    tensors |= {f"reference.{name}": p.detach().clone() for name, p in reference.named_parameters()}
    facts: dict[str, Any] = {"trl": trl.__version__, "config": CONFIG, "pairs": PAIRS, "beta": BETA, "cases": {}}
    for case, (loss_type, loss_weights, smoothing, compares) in CASES.items():
        found, gradients = compute(case, reference)
        how = {"loss_type": loss_type, "loss_weights": loss_weights, "label_smoothing": smoothing}
        facts["cases"][case] = {**how, "reference": compares, "found": found}
        tensors |= {f"gradients.{case}.{name}": gradient for name, gradient in gradients.items()}
    save_file(tensors, folder / "preference.safetensors")
    (folder / "preference.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
