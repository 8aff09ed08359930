"""The typed root of the configuration: every top-level key, its type, default and meaning.

Component groups (`vision`, `connector`, ...) hold a `_target_` whose constructor is their schema; `compose.py` checks
them against its signature. Everything else is typed here. No torch import.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from omegaconf import MISSING


@dataclass
class InitFrom:
    """Weights that a run starts from: another run's folder (or one of its checkpoints), optionally only some parts."""

    run: str = MISSING  # a run folder, a checkpoint folder, or a .safetensors file
    parts: list[str] | None = None  # parts to take (vision, connector.qformer, llm ...); null: everything it holds
    which: str = "last"  # last | best, when `run` is a run folder


@dataclass
class Reference:
    """A second, frozen model that an objective compares the trained one with."""

    model: str | None = None  # null: none | start: as this run starts | a run folder (a teacher): as that run ended
    which: str = "last"  # last | best, of a run folder
    init_from: list[InitFrom] | None = None  # start: a copy with these weights; null: the run's own, or adapters off


@dataclass
class Rule:
    """Who learns, and how: the first rule whose `match` (regex over the full name) fits a parameter decides."""

    match: str = MISSING
    lr: float | None = None  # absolute learning rate; null: frozen
    weight_decay: float | None = None  # null: optim.weight_decay
    layer_decay: float | None = None  # LR factor per layer, counted from the last one
    warmup_steps: int | None = None  # its own warm-up, in optimizer steps; null: that of lr_schedule
    decay_norms_and_biases: bool | None = None  # null: params.decay_norms_and_biases
    frozen_mode: str | None = None  # eval, train: the mode of what is frozen, train keeps its dropout; null: eval


@dataclass
class Params:
    """The parameter policy. `rules` is a list, replaced whole by a recipe."""

    rules: list[Rule] = field(default_factory=list)
    decay_norms_and_biases: bool = False  # False: no weight decay on tensors with fewer than two dimensions


@dataclass
class BatchSize:
    """How much goes into one optimizer step. Give exactly one of `samples` and `tokens`."""

    samples: int | None = None  # samples per optimizer step over all ranks, as papers count
    tokens: int | None = None  # token budget per optimizer step over all ranks
    micro: int = 1  # rows per rank and forward pass; accumulation follows from it
    normalize: str = "token"  # token | sample | source | sqrt_length: what every target weighs in the mean


@dataclass
class Guard:
    """When a step makes no update, and what of a run is looked at because it would go wrong without an error.

    A step whose gradients are not finite never makes an update; its samples are recorded.
    """

    spike: float | None = None  # nor one whose norm is so many median deviations above the usual one; null: any
    window: int = 100  # steps that say what is usual
    max_in_a_row: int = 10  # allowed steps without update in a row; one more stops the run
    rollback: int = 0  # or so often takes it back to the checkpoint before them, leaving out the data since
    random_frozen: str = "refuse"  # a part that is frozen, and that no file fills: refuse | warn | allow
    weights: bool = True  # after the first update frozen weights must be unchanged, and what learns must have changed
    first_step: bool = True  # say what the first step learns, and its loss; warn where they are implausible
    max_unknown: float | None = 0.2  # share of targets unknown to the tokenizer that is borne; null: any


@dataclass
class Trainer:
    """Running. Every interval counts optimizer steps."""

    epochs: float | None = 1.0  # passes over the data
    max_steps: int | None = None  # stop here even if epochs would go on
    precision: str = "32-true"  # 32-true | bf16-mixed | bf16-true | 16-mixed
    halve_frozen: bool = False  # *-mixed: frozen layers keep the 16-bit weights that they multiply with; ddp or one GPU
    max_grad_norm: float | None = None  # gradient norm clip; null: none
    val_every: int | None = None  # validation loss and evaluators; they also run at the end
    evaluate_first: bool = False  # also run the evaluators before the first step, as at the end
    save_every: int | None = 500  # checkpoints; null: only at the end (and when the run is asked to stop)
    log_every: int = 10
    async_save: bool = False  # write checkpoints while training goes on, from a copy in memory
    keep_last: int = 2  # newest checkpoints kept, besides BEST
    keep_best: int = 1  # best checkpoints kept, by `best`
    keep_every: int | None = None  # checkpoints of every n-th step are kept for good
    best: str = "loss"  # what BEST follows: loss, or an evaluator's metric such as answers/exact_match
    activation_checkpointing: str = "none"  # none | full | selective: keep products and attention, recompute the rest
    compile: bool = False
    accelerator: str = "auto"  # auto | cpu | gpu
    min_supervised_ratio: float = 0.001  # stop when a window of steps supervises fewer of its text tokens than this
    max_bad_samples: int = 100  # allowed bad samples in a row; one more stops the run
    max_bad_share: float = 0.05  # share of bad ones among all drawn samples, from the 1000th on, that is borne
    strict: bool = False  # the first bad sample stops the run
    guard: Guard = field(default_factory=Guard)
    skip_steps: list[list[int]] = field(default_factory=list)  # [[first, last]]: steps whose data makes no update
    largest_first: bool = False  # run the plan's largest micro-batches before the first step: what does not fit shows
    export: bool = False  # at the end, write a folder that `transformers` loads, if it knows such a model
    peak_tflops: float | None = None  # of one device, for the logged MFU; null: known for common GPUs
    watchdog_minutes: float | None = 20.0  # end a run without progress for this long, less than launch.timeout_minutes
    threads: int | None = None  # CPU threads; null: torch's choice. They sleep when idle (OMP_WAIT_POLICY=PASSIVE)


@dataclass
class Launch:
    """How processes are started. `local` starts them itself; torchrun and srun find them started."""

    kind: str = "local"  # local | torchrun | srun
    devices: int = 1  # processes per node that train; every other mode, eval too, runs in one process
    nodes: int = 1
    timeout_minutes: float = 30.0  # collective timeout; an evaluation on rank 0 must be shorter


@dataclass
class Paths:
    """Folders, relative to where the command was started."""

    data: str = "data"
    runs: str = "runs"


@dataclass
class Stage:
    """One stage of a schedule: a recipe and what it takes over from earlier stages."""

    recipe: str = MISSING
    init_from: list[InitFrom] = field(default_factory=list)  # `run` names an earlier stage's recipe
    overrides: list[str] = field(default_factory=list)


@dataclass
class Schedule:
    """An ordered list of stages."""

    name: str = MISSING
    stages: list[Stage] = field(default_factory=list)


@dataclass
class Columns:
    """`mode=caption` and `mode=score`: what a run says of a shard set. Lengths and sampling are BLIP's CapFilt."""

    shards: str | None = None  # the shard set
    output: str | None = None  # folder of the columns; null: <shards>.columns/<mode>
    scores: str = "captions"  # mode=score: how well captions fit; "answers": log-likelihoods of pairs; "teacher"
    top_k: int = 16  # scores=teacher: most likely ids that are written of every learned token
    gamma: float | None = None  # scores=answers: weight of tokens in weighed segments; as objective.dpo.gamma
    captions: str | None = None  # mode=score: the columns whose captions take the place of the samples' own
    which: str = "last"  # weights: last | best
    batch: int = 64  # pairs a call of the model
    part: int = 0  # several processes share the work: this one takes the shards of part 0, 1, ...
    parts: int = 1  # ... of so many
    max_new_tokens: int = 26  # 30 with the four of the prompt "[DEC] a picture of"
    min_new_tokens: int = 6  # 10 with them
    temperature: float = 1.0  # 0: the most likely caption; scores=teacher: as objective.distill.temperature
    top_p: float = 0.9
    repetition_penalty: float = 1.1


@dataclass
class Target:
    """What a dry run plans for: hardware, and how long samples are while there are no shards to ask."""

    gpus: int = 8
    memory_gib: float = 80.0  # of one GPU
    gpus_per_node: int = 8
    cpu_gib: float = 1024.0  # CPU memory of one node, for strategies that offload
    image_width: int = 640  # pixels of a typical image, for image plans that follow its size
    image_height: int = 480
    text_tokens: int = 128  # text tokens of a typical sample, besides its image's
    supervised_tokens: int = 64  # how many of them are learned


MODEL_PART = {"model_part": True}
"""Marks the groups whose components a family is given as arguments of the same names."""


@dataclass
class Root:
    """The whole configuration. `python -m vlm_train --cfg job` prints it composed."""

    mode: str = "fit"  # fit | eval | caption | score | export | show | lengths | import | config
    dry_run: bool = False  # build on the meta device, print the plan, train nothing
    seed: int = 42
    run_name: str | None = None  # null: <recipe>-<hash of the training-relevant config>
    run: str | None = None  # eval, caption, score, export, show: an existing run folder, whose config is used
    resume: str = "auto"  # auto: this run's newest valid checkpoint | never | path | restart: delete its checkpoints
    init_from: list[InitFrom] = field(default_factory=list)
    allow_targets: list[str] = field(default_factory=list)  # further `_target_` prefixes to trust: command line only
    recipe_name: str = "custom"  # with recipe=<name>, that name; names the run

    model: Any = None
    vision: Any = field(default=None, metadata=MODEL_PART)
    connector: Any = field(default=None, metadata=MODEL_PART)
    llm: Any = field(default=None, metadata=MODEL_PART)
    parts: dict[str, Any] = field(default_factory=dict)  # further arguments of the family: {router: {_target_: ...}}
    tokenizer: Any = None
    image: Any = None
    template: Any = None
    instruction: Any = None
    objective: Any = None
    peft: Any = None
    data: Any = None
    optim: Any = None
    lr_schedule: Any = None
    strategy: Any = None
    callbacks: Any = None
    logger: Any = None
    eval: Any = None
    exporter: Any = None
    importer: Any = None

    reference: Reference = field(default_factory=Reference)
    params: Params = field(default_factory=Params)
    batch: BatchSize = field(default_factory=BatchSize)
    trainer: Trainer = field(default_factory=Trainer)
    launch: Launch = field(default_factory=Launch)
    paths: Paths = field(default_factory=Paths)
    schedule: Schedule | None = None
    sweep_metric: str | None = None  # multirun: the final metric that a sweeper such as Optuna optimises
    columns: Columns = field(default_factory=Columns)
    target: Target = field(default_factory=Target)
    tiny: dict[str, Any] = field(default_factory=dict)  # dry_run only: the parts' `tiny:` blocks, for its tiny copy


MODEL_PARTS = tuple(one.name for one in fields(Root) if one.metadata == MODEL_PART)
"""The groups that hold a part of the model: one component, or named ones as `{clip: {_target_: ...}, dino: ...}`."""

PART_GROUPS = (
    "model",
    *MODEL_PARTS,
    "tokenizer",
    "image",
    "template",
    "instruction",
    "peft",
    "data",
    "optim",
    "lr_schedule",
    "strategy",
)
"""Groups that hold one component (one `_target_`); those of `SEVERAL` may hold named ones instead."""

SEVERAL = (*MODEL_PARTS, "image")
"""Groups that may map names to components. Image plans bear the names of the vision encoders that they are for."""

DICT_GROUPS = ("parts", "objective", "callbacks", "logger", "eval", "exporter", "importer")
"""Groups that hold named components: `{name: {_target_: ...}}`; null removes one."""
