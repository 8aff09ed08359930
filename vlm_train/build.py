"""Configuration -> objects: every component of a run is made here, and given what other parts decide."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers.utils.logging import disable_progress_bar

from vlm_train.config.part_error import name_failing_code, name_failing_part
from vlm_train.config.schema import MODEL_PARTS
from vlm_train.contracts.evaluator import Evaluator
from vlm_train.contracts.exporter import Exporter, Importer
from vlm_train.contracts.family import Family
from vlm_train.contracts.given import GIVEN
from vlm_train.contracts.model_parts import find_encoders
from vlm_train.contracts.objective import Objective, list_columns
from vlm_train.data.images.plan import ImagePlan
from vlm_train.data.media_layout import make_layout
from vlm_train.data.processor import Processor
from vlm_train.distributed import process_rank
from vlm_train.errors import ConfigError, PartError
from vlm_train.models.adapters.lora import describe_adapters
from vlm_train.models.layers.inserted_blocks import check_ownership
from vlm_train.models.libraries import silence_libraries
from vlm_train.seeds import derive_seed

if TYPE_CHECKING:
    from vlm_train.data.datamodule import VLMData


@dataclass
class Assembly:
    """What a configuration builds: the model, and the processor that makes its input."""

    cfg: DictConfig
    model: Family
    processor: Processor


def instantiate_part(group: str, node: DictConfig, **given: Any) -> Any:
    """Call a node's `_target_` with its options and what its group is given (see `GIVEN`): live objects, not copied."""
    assert group == "model" or given.keys() <= GIVEN.get(group, frozenset()), (group, sorted(given))
    with name_failing_part(group, node):
        return instantiate(node, _partial_=True, _convert_="all")(**given)


def make_each(group: str, nodes: DictConfig | None, **given: Any) -> dict[str, Any]:
    """Name -> component of a group of named ones; a null entry removes one."""
    named = (nodes or {}).items()
    return {str(name): instantiate_part(group, node, **given) for name, node in named if node is not None}


def build_assembly(cfg: DictConfig, *, meta: bool = False) -> Assembly:
    """Build everything a run needs but its data; with `meta` the model has shapes, but no weights."""
    silence_libraries()
    if not sys.stderr.isatty():
        disable_progress_bar()  # of transformers, which writes bars into log files
    tokenizer = build_tokenizer(cfg)
    template = instantiate_part("template", cfg.template)
    template.check_tokenizer(tokenizer)
    model = build_model(cfg, tokenizer, meta=meta)
    if process_rank() == 0:
        for line in describe_adapters(model):
            print(line, flush=True)
    return Assembly(cfg, model, build_processor(cfg, model, tokenizer, template))


def build_processor(cfg: DictConfig, model: Family, tokenizer: Any, template: Any) -> Processor:
    """The processor of a model: what the parts decide about its data, without their weights."""
    images = build_images(cfg, model)
    return Processor(
        tokenizer=tokenizer,
        template=template,
        layout=make_layout(model, images, views_apart=bool(template.style.views)),
        images=images,
        instruction=None if cfg.instruction is None else instantiate_part("instruction", cfg.instruction),
        streams=dict(model.streams),
        max_length=cfg.data.get("max_length"),
    )


def build_model(cfg: DictConfig, tokenizer: Any = None, *, meta: bool = False) -> Family:
    """The model of a configuration: parts, their weights, the family's wiring, adapters.

    Args:
        tokenizer: gives the vocabulary size where `llm.config` leaves it open.
        meta: on the meta device, without weights.
    """
    family = get_class(cfg.model._target_)
    wanted = [name for name in inspect.signature(family).parameters if name in MODEL_PARTS]
    parts: dict[str, Any] = {}
    with torch.device("meta" if meta else "cpu"):
        for name in sorted(wanted, key="connector".__eq__):  # it is given the widths of the others
            parts[name] = _build_part(name, parts, cfg, tokenizer, meta)
        parts |= dict(cast(nn.ModuleDict, _build_part("parts", parts, cfg, tokenizer, meta)).items())
        torch.manual_seed(derive_seed(cfg.seed, "init", "model"))
        model = instantiate_part("model", cfg.model, **parts)
        if not isinstance(model, Family):
            raise ConfigError(f"model: {cfg.model._target_} does not inherit from {Family.__module__}.Family.")
        check_ownership(model)
        if not meta:
            model.load_weights()
        if cfg.peft is not None:
            torch.manual_seed(derive_seed(cfg.seed, "init", "peft"))
            instantiate_part("peft", cfg.peft, model=model)
    return model


def build_on_meta(cfg: DictConfig) -> Family | None:
    """The model to look at before any weight is read; None, and a sentence, where its own code needs values."""
    silence_libraries()
    try:
        with torch.random.fork_rng(devices=[]), name_failing_code("Its own code failed"):
            return build_model(cfg, build_tokenizer(cfg), meta=True)
    except PartError as error:
        print(f"model: not built on the meta device. {error}", flush=True)
        return None


def _build_part(name: str, parts: dict[str, Any], cfg: DictConfig, tokenizer: Any, meta: bool) -> nn.Module:
    """A part with its weights: one component, or a `ModuleDict` of those that its node names."""

    def build_one(node: DictConfig, *address: str) -> nn.Module:
        torch.manual_seed(derive_seed(cfg.seed, "init", *address))
        part = instantiate_part(name, node, **_give(name, address[1:], node, parts, tokenizer))
        if not meta and getattr(part, "weights", None):
            part.load_weights()
        return cast(nn.Module, part)

    node = cfg[name]
    if "_target_" in node:
        return build_one(node, name)
    return nn.ModuleDict(
        {member: build_one(inner, name, member) for member, inner in node.items() if inner is not None}
    )


def _give(
    name: str, member: tuple[str, ...], node: DictConfig, parts: dict[str, Any], tokenizer: Any
) -> dict[str, Any]:
    """What the other parts decide about part `name`, or about a member of it."""
    if name == "connector":
        reads = "vocab_size" in node and node.vocab_size is None and tokenizer is not None
        in_dim = _width_of(parts["vision"], "out_dim")
        if isinstance(in_dim, dict) and not member:
            _require_several(node, in_dim)
        in_dim = in_dim[member[0]] if member else in_dim
        out_dim = _width_of(parts["llm"], "dim") if "llm" in parts else None
        return {"in_dim": in_dim, "out_dim": out_dim} | ({"vocab_size": len(tokenizer)} if reads else {})
    if name == "parts":
        taken = inspect.signature(get_class(node._target_)).parameters
        widths = [("in_dim", "vision", "out_dim"), ("out_dim", "llm", "dim")]
        return {key: _width_of(parts[one], of) for key, one, of in widths if one in parts and key in taken}
    if name == "llm" and tokenizer is not None:
        if (size := node.config.get("vocab_size")) is None:
            return {"vocab_size": len(tokenizer)}
        if "new_tokens" in node:
            return {}
        return {"new_tokens": max(0, len(tokenizer) - size)}  # padded tables have room; others get rows of their own
    return {}


def _require_several(connector: DictConfig, widths: dict[str, int]) -> None:
    """Raises ConfigError if a connector behind several encoders takes the width of one."""
    taken = inspect.signature(get_class(connector._target_)).parameters.get("in_dim")
    if taken is not None and taken.annotation in (int, "int"):
        raise ConfigError(
            f"connector: {connector._target_} takes the features of one encoder, but vision has {', '.join(widths)}. "
            f"Give each its own (connector.{next(iter(widths))}=...), or choose one whose in_dim is a mapping."
        )


def _width_of(part: Any, attribute: str) -> Any:
    """A width of a part; where it has several members, theirs by name."""
    if isinstance(part, nn.ModuleDict):
        return {name: getattr(member, attribute) for name, member in part.items()}
    return getattr(part, attribute)


def build_images(cfg: DictConfig, model: Any) -> dict[str, ImagePlan]:
    """The image plan of every vision encoder, with what it needs to know of it; none without an encoder."""
    nodes: Any = cfg.image or {}
    single = nodes if "_target_" in nodes else None
    return {name: build_image_plan(single or nodes[name], encoder) for name, encoder in find_encoders(model).items()}


def build_image_plan(node: DictConfig, vision: Any) -> ImagePlan:
    """The image plan of a configuration for an encoder, which gives all that `GIVEN` names.

    Raises:
        ConfigError: the plan makes views of one size, and the encoder takes native resolution, or the other way round.
    """
    wanted = inspect.signature(get_class(node._target_)).parameters
    if ("size" in wanted) != (vision.image_size is not None):
        size = vision.image_size
        takes = "native resolution" if size is None else f"views of {size[0]} x {size[1]} pixels"
        makes = "views of one size" if "size" in wanted else "flat patches"
        raise ConfigError(f"image: {node._target_} makes {makes}, but the vision encoder takes {takes}")
    given = {"size": vision.image_size, "mean": vision.image_mean, "patch_grid": vision.patch_grid}
    defaults = {"patch_size": None, "frames_per_patch": 1, "processor": None}
    given |= {name: getattr(vision, name, default) for name, default in defaults.items()}
    if (given["processor"] is not None) != ("processor" in wanted):
        raise ConfigError(f"image: {node._target_}; a whole model (model=hf_vlm) goes with image=library, and only it")
    given = {name: value for name, value in given.items() if name in wanted}
    return cast(ImagePlan, instantiate_part("image", node, **given))


def build_tokenizer(cfg: DictConfig) -> Any:
    """The tokenizer of the language model's text."""
    return instantiate_part("tokenizer", cfg.tokenizer)


def build_data(cfg: DictConfig, processor: Processor) -> VLMData:
    """The data module; it plans nothing yet."""
    columns = sorted({name for one in build_objectives(cfg).values() for name in list_columns(one)})
    given: dict[str, Any] = {"batch": cfg.batch, "seed": cfg.seed, "columns": columns}
    return cast("VLMData", instantiate_part("data", cfg.data, processor=processor, **given))


def build_objectives(cfg: DictConfig) -> dict[str, Objective]:
    """The configured losses by name."""
    return make_each("objective", cfg.objective)


def build_evaluators(cfg: DictConfig) -> dict[str, Evaluator]:
    """Name -> evaluator. Raises ConfigError for what is none."""
    return _require_all("eval", make_each("eval", cfg.eval), Evaluator)


def _require_all(group: str, found: dict[str, Any], protocol: type) -> dict[str, Any]:
    """`found`, all of which have the members of `protocol`."""
    members = [member for member in vars(protocol) if not member.startswith("_")]
    for name, one in found.items():
        if missing := [member for member in members if not hasattr(one, member)]:
            raise ConfigError(
                f"{group}.{name}: {type(one).__name__} is no {protocol.__name__}: no {', '.join(missing)}."
            )
    return found


def build_exporters(cfg: DictConfig) -> dict[str, Exporter]:
    """Name -> exporter, in the order in which they are asked. Raises ConfigError for what is none."""
    return _require_all("exporter", make_each("exporter", cfg.exporter), Exporter)


def build_importers(cfg: DictConfig) -> dict[str, Importer]:
    """Name -> importer, in the order in which they are asked. Raises ConfigError for what is none."""
    return _require_all("importer", make_each("importer", cfg.importer), Importer)


def build_optimizer(cfg: DictConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer of parameter groups, each a dictionary as torch takes it."""
    return cast(torch.optim.Optimizer, instantiate_part("optim", cfg.optim, params=groups))


def build_lr_schedule(cfg: DictConfig, optimizer: torch.optim.Optimizer, *, total_steps: int) -> Any:
    """The learning rate schedule of an optimizer over a run of `total_steps`; groups with a warm-up of their own
    (`params.rules`) follow the same schedule with that.

    Raises:
        ConfigError: there are such groups, and the schedule cannot be changed group by group.
    """
    schedule = instantiate_part("lr_schedule", cfg.lr_schedule, optimizer=optimizer, total_steps=total_steps)
    for number, group in enumerate(optimizer.param_groups):
        if (own := group.get("warmup_steps")) is None:
            continue
        if not isinstance(schedule, LambdaLR):
            kind = type(schedule).__name__
            raise ConfigError(f"params.rules: warmup_steps {own}, but lr_schedule makes a {kind}; allowed: a LambdaLR")
        node: Any = OmegaConf.merge(cfg.lr_schedule, {"warmup_steps": own, "warmup_ratio": 0.0})
        other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        same = instantiate_part("lr_schedule", node, optimizer=other, total_steps=total_steps)
        schedule.lr_lambdas[number] = same.lr_lambdas[0]
        group["lr"] = group["initial_lr"] * same.lr_lambdas[0](schedule.last_epoch)
    schedule._last_lr = [group["lr"] for group in optimizer.param_groups]  # what `get_last_lr` and checkpoints say
    return schedule


def build_callbacks(cfg: DictConfig) -> list[Any]:
    """The configured callbacks; those that every run has are made by the trainer."""
    return [*make_each("callbacks", cfg.callbacks).values()]


def build_loggers(cfg: DictConfig, folder: Path) -> list[Any]:
    """The configured loggers of a run in `folder`."""
    return [*make_each("logger", cfg.logger, folder=folder).values()]


def build_strategy(node: DictConfig) -> Any:
    """The strategy of a node that `vlm_train.training.trainer.make_strategy` has completed."""
    return instantiate_part("strategy", node)
