"""One training run: build, hand-off, train (or go on training), evaluate, report."""

from __future__ import annotations

import time
import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vlm_train.checkpoint.resume import Resume, find_resume
from vlm_train.checkpoint.weights import WHOLE, load_run_weights
from vlm_train.config.run_identity import run_dir, run_id
from vlm_train.distributed import count_started, process_rank, require_devices, say_once
from vlm_train.errors import AssetError, ConfigError, TrainingError
from vlm_train.runs import record
from vlm_train.runs.folder import RunFolder
from vlm_train.runs.rollback import read_rollbacks


def fit_run(cfg: DictConfig, look_at: Any = None) -> dict[str, Any]:
    """Train the run to its end, resumed where it stopped, and return its metrics. `look_at`: see `prepare_models`."""
    require_devices(cfg)
    folder, identity = run_dir(cfg), run_id(cfg)
    folder.mkdir(parents=True, exist_ok=True)
    status = record.read_record(folder)
    if status.get("status") == "done" and cfg.resume == "auto":
        say_once(f"{identity} is already done: {folder}. Choose another run_name to train it again.")
        return dict(status.get("metrics") or {})
    with record.lock_folder(folder) if process_rank() == 0 else nullcontext():
        if cfg.resume == "restart" and process_rank() == 0:
            RunFolder(folder).remove_training()
        resumed = find_resume(cfg.resume, folder, identity)
        if process_rank() == 0:  # before any other rank can log
            record.keep_metrics(folder, resumed.step if resumed else -1)
        say_once(f"{identity}: {_describe_start(resumed, count_started(cfg.launch.kind))}")
        try:
            return _train_run(cfg, folder, identity, resumed, look_at)
        except BaseException as error:
            stopped = isinstance(error, SystemExit | KeyboardInterrupt)  # ours, or what Lightning makes of a signal
            _write_status(folder, status="interrupted" if stopped else "failed")
            raise


def _describe_start(resumed: Resume | None, world: int) -> str:
    if resumed is None:
        return "starting at step 0"
    before = resumed.manifest.get("world")
    changed = f", written by {before} processes; now {world}" if before not in (None, world) else ""
    return f"resuming from {resumed.folder}{changed}"


def _train_run(cfg: DictConfig, folder: Path, identity: str, resumed: Resume | None, look_at: Any) -> dict[str, Any]:
    import torch

    from vlm_train.build import build_data
    from vlm_train.training.callbacks.largest_first import LargestFirst
    from vlm_train.training.callbacks.loop import Evaluation
    from vlm_train.training.filled import require_filled
    from vlm_train.training.optim import keep_kernel
    from vlm_train.training.packing import settle_packing
    from vlm_train.training.params import make_policy
    from vlm_train.training.prepare_models import prepare_models
    from vlm_train.training.trainer import halve_parts, halves_weights, loop_callbacks, make_strategy, make_trainer

    if cfg.trainer.threads:
        torch.set_num_threads(cfg.trainer.threads)
    if resumed:
        keep_kernel(cfg.optim, resumed.manifest)
    world = count_started(cfg.launch.kind)
    strategy = make_strategy(cfg, world)
    shares = world > 1 and strategy.shards_model and process_rank() > 0  # rank 0 spreads its weights later
    models = prepare_models(cfg, resumed, shares=shares, to_bf16=halves_weights(cfg, strategy), look_at=look_at)
    assembly, evaluators = models.assembly, models.evaluators
    policy = make_policy(cfg, assembly.model)
    if not shares:
        require_filled(assembly.model, models.handed.filled, cfg.trainer.guard.random_frozen, resumes=bool(resumed))
    halve_parts(cfg, strategy, assembly.model, models.reference)
    settle_packing(cfg, assembly.model, alone=world == 1 or not strategy.shards_model)
    data = build_data(cfg, assembly.processor)
    data.plan = _make_plan(cfg, data, assembly.model, world, resumed)
    facts = _collect_facts(cfg, models, data, identity, None if shares else resumed)
    facts |= {"rollbacks": len(read_rollbacks(folder)), "fused": cfg.optim.get("fused"), **data.note_estimate()}
    count_work = partial(_count_work, cfg, models.skeleton) if cfg.trainer.log_every <= data.plan.steps else None
    module = _make_module(cfg, models, policy, data.plan, folder, count_work if process_rank() == 0 else None)
    evaluation = Evaluation(assembly.processor, evaluators, folder, first=cfg.trainer.evaluate_first)
    callbacks = loop_callbacks(cfg, data.plan, module, evaluation, facts, resumed, held_out=len(data.val) > 0)
    if cfg.trainer.largest_first:
        callbacks.append(LargestFirst(data))
    trainer = make_trainer(cfg, data.plan, strategy, callbacks, folder)
    if trainer.is_global_zero:
        _describe_run(cfg, assembly, policy, trainer, folder, identity, evaluators)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # not our calls
        trainer.fit(module, datamodule=data)
        if trainer.global_step < data.plan.steps:
            raise TrainingError(f"training stopped at step {trainer.global_step} of {data.plan.steps}")
    metrics = _finish_run(assembly, module, evaluators, folder, trainer)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # otherwise its threads abort the process at exit
    return metrics


def _collect_facts(cfg: DictConfig, models: Any, data: Any, identity: str, resumed: Resume | None) -> dict[str, Any]:
    """What a checkpoint's manifest says of the run; it must be what the resumed one says."""
    from vlm_train.data.text.tokenizer import hash_vocabulary
    from vlm_train.models.weights.fingerprint import hash_sources

    assembly = models.assembly
    facts: dict[str, Any] = {
        "run_id": identity,
        "init_from": models.handed.digests,
        WHOLE: resumed is None or bool(resumed.manifest.get(WHOLE)),
        "weights": hash_sources(assembly.model),
        "vocabulary": hash_vocabulary(assembly.processor.tokenizer),
        "data": data.hash_samples(),
        "order": data.hash_order(),
    }
    if cfg.reference.model is not None:
        facts["reference"] = models.digests
    if resumed:
        resumed.require_same_data(**facts)
    return facts | {"frozen": [name for name, p in assembly.model.named_parameters() if not p.requires_grad]}


def _describe_run(
    cfg: DictConfig, assembly: Any, policy: Any, trainer: Any, folder: Path, identity: str, evaluators: dict[str, Any]
) -> None:
    """Say and record what is about to be trained."""
    from vlm_train.evaluation.run import describe_evaluators

    print(policy.format_table(), flush=True)
    record.write_json(RunFolder(folder).parameters, policy.list_parts())
    assembly.processor.tokenizer.save_pretrained(RunFolder(folder).tokenizer)
    names = {"run_id": identity, "recipe": cfg.recipe_name, "total_steps": trainer.max_steps}
    names["evaluators"] = describe_evaluators(evaluators, {name: name for name in evaluators})
    _write_status(folder, **names, status="running", started=time.time(), exit_code=None)
    for logger in trainer.loggers:
        logger.log_hyperparams(OmegaConf.to_container(cfg))  # interpolations kept: no secret is resolved


def _make_plan(cfg: DictConfig, data: Any, model: Any, world: int, resumed: Resume | None) -> Any:
    from vlm_train.data.order.cost import cost_of
    from vlm_train.data.survey import require_known_targets

    if resumed:
        data.keep_order(resumed.manifest)
    plan = data.make_plan(
        batch=cfg.batch.samples,
        tokens=cfg.batch.tokens,
        epochs=cfg.trainer.epochs,
        most=cfg.trainer.max_steps,
        world=world,
        cost=cost_of(model),
    )
    if data.train.lengths is not None and process_rank() == 0:
        require_known_targets(data.train, cfg.trainer.guard.max_unknown)
    return plan


def _make_module(cfg: DictConfig, models: Any, policy: Any, plan: Any, folder: Path, count_work: Any) -> Any:
    from vlm_train.build import build_lr_schedule, build_objectives, build_optimizer
    from vlm_train.contracts.model_parts import find_layers
    from vlm_train.models.layers.activation_checkpointing import checkpoint_layers
    from vlm_train.training.first_step import make_first_steps
    from vlm_train.training.module import VLMModule
    from vlm_train.training.reference import lend

    model, reference = models.assembly.model, models.reference
    layers = list(find_layers(model).values())
    if cfg.trainer.activation_checkpointing != "none":
        checkpoint_layers(layers, selective=cfg.trainer.activation_checkpointing == "selective")
    for one in (layers or [model]) if cfg.trainer.compile else ():
        one.compile()  # layer by layer: the same code for all of them, and shards are gathered in between
    objectives = build_objectives(cfg)
    for name, objective in objectives.items():
        if objective.needs_whole_step and (plan.packing or cfg.batch.micro * plan.world < cfg.batch.samples):
            raise ConfigError(
                f"objective.{name}: contrasts all samples of a step with each other, so they cannot be packed or cut "
                f"into micro-batches; allowed: data.pack=null batch.micro={cfg.batch.samples // plan.world}"
            )
    return VLMModule(
        model,
        objectives,
        policy,
        partial(build_optimizer, cfg),
        partial(build_lr_schedule, cfg, total_steps=plan.steps),
        reference=reference,
        lend_reference=lend(cfg, model, reference),
        seed=cfg.seed,
        total_steps=plan.steps,
        max_grad_norm=cfg.trainer.max_grad_norm,
        normalize=cfg.batch.normalize,
        max_bad_samples=cfg.trainer.max_bad_samples,
        max_bad_share=cfg.trainer.max_bad_share,
        strict=cfg.trainer.strict,
        min_supervised_ratio=cfg.trainer.min_supervised_ratio,
        guard=_make_guard(cfg, folder),
        first_steps=make_first_steps(cfg.trainer.guard, model, models.handed.filled),
        folder=folder,
        count_work=count_work,
        peak_tflops=cfg.trainer.peak_tflops,
    )


def _count_work(cfg: DictConfig, skeleton: Any) -> Any:
    """What steps compute, for the log; None, and a sentence, where the model cannot be traced without its weights."""
    import torch

    from vlm_train.training.step_flops import work_of

    if skeleton is None:
        return None
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            return work_of(cfg, skeleton)
    except Exception as error:  # of any model's own code
        print(f"tflops: not logged: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
        return None


def _make_guard(cfg: DictConfig, folder: Path) -> Any:
    from vlm_train.training.guard import Guard

    own = {name: cfg.trainer.guard[name] for name in ("spike", "window", "max_in_a_row", "rollback")}
    return Guard(folder, **own, scaled=cfg.trainer.precision == "16-mixed", skip=cfg.trainer.skip_steps)


def _finish_run(assembly: Any, module: Any, evaluators: dict[str, Any], folder: Path, trainer: Any) -> dict[str, Any]:
    """Final evaluation, on all ranks where weights are in shards; run.json and report, on rank 0."""
    from vlm_train.evaluation.run import run_evaluators
    from vlm_train.models.precision import HALVED
    from vlm_train.training.callbacks.loop import results_folder

    if not (trainer.is_global_zero or trainer.strategy.shards_model):
        return {}
    if getattr(assembly.model, HALVED, None) and (
        evaluators or assembly.cfg.trainer.export
    ):  # in memory they have lost bits
        assembly.model.to("cpu")
        assembly = _rebuild_whole(assembly, folder)
        assembly.model.to(module.device)
    metrics: dict[str, float] = {}
    if evaluators:
        with results_folder(folder, trainer.is_global_zero) as results:
            metrics = run_evaluators(assembly.model, assembly.processor, evaluators, results)  # and record the results
        module.write_metrics("test", metrics)
    if not trainer.is_global_zero:
        return {}
    for name, split in (("loss", "train"), ("val_loss", "val")):
        if last := record.last_loss(folder, split):
            metrics[name] = last["loss"]
    if assembly.cfg.trainer.export:
        _export_run(_rebuild_whole(assembly, folder) if trainer.strategy.shards_model else assembly, folder)
    _write_status(folder, status="done", step=trainer.global_step, metrics=metrics, finished=time.time())
    _write_report(folder)
    return metrics


def _write_report(folder: Path) -> None:
    """The page of a run that is done. What keeps it from being written, such as a full disk, fails no run."""
    from vlm_train.report import write_report

    try:
        print(f"report: {write_report(folder)}", flush=True)
    except Exception as error:
        path = RunFolder(folder).report
        print(f"WARNING: {path}: cannot be written: {error}. The run is done all the same.", flush=True)


def _rebuild_whole(assembly: Any, folder: Path) -> Any:
    """The run as it is on the disk: in memory no process holds all of its weights."""
    from vlm_train.build import build_assembly

    whole = build_assembly(assembly.cfg)
    load_run_weights(whole.model, assembly.cfg.init_from, folder)
    return whole


def _export_run(assembly: Any, folder: Path) -> None:
    """Export at the end of training. No exporter may know a model of new parts; its training counts."""
    from vlm_train.build import build_exporters
    from vlm_train.export.run import write_export

    try:
        write_export(assembly, folder, build_exporters(assembly.cfg))
    except AssetError as error:
        print(f"trainer.export: failed, an earlier export is kept: {error}", flush=True)
    except ConfigError as error:
        print(f"trainer.export: not exported: {error}", flush=True)


def _write_status(folder: Path, **changes: Any) -> None:
    if process_rank() == 0:
        record.update_record(folder, **changes)
