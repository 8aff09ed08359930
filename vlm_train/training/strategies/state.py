"""The training state in one form for every strategy: flat pieces of named tensors.

A checkpoint of such pieces can be read by any number of processes under any strategy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vlm_train.checkpoint.pieces import Piece
from vlm_train.errors import ConfigError


class OwnState:
    """What all our strategies share. Mixed into Lightning's.

    The module makes the whole training step itself, and calls the methods below in the order in which they stand.
    `checkpoint` saves and restores optimizer and weights through `pieces` and `whole`. When training ends the model
    stays where it is.
    """

    # Literals: `vlm_train.check.strategies` reads them before anything is imported.

    spans_processes: ClassVar[bool] = True
    """Whether several processes train together."""

    sharded_by: ClassVar[Mapping[str, Any] | None] = None
    """Settings with which ranks hold parts of the weights only, see `shards_model`; empty: always, None: never."""

    compiles_shards: ClassVar[bool] = True
    """Whether `torch.compile` takes a model whose weights are sharded so."""

    scales_loss: ClassVar[bool] = True
    """Whether there is a loss scale for 16-mixed."""

    keeps_fp32_copy: ClassVar[bool] = False
    """Whether the optimizer keeps fp32 weights behind a 16-bit model."""

    compute_dtype: torch.dtype | None = None
    """Type to which the strategy itself casts weights for a forward pass, without Lightning's precision plugin."""

    device_can_veto: ClassVar[bool] = False
    """Whether a fused optimizer's step is the whole update, so that its `found_inf` prevents it."""

    clips_gradients = False
    """Whether the optimizer's step clips, and asks the module's `objects_to` itself."""

    optimizers: list[Any]
    is_global_zero: bool
    lightning_module: Any
    precision_plugin: Any

    @property
    def shards_model(self) -> bool:
        """Whether ranks hold parts of the weights only: a forward pass is a collective, so all ranks evaluate
        together."""
        return self.sharded_by is not None and all(getattr(self, k) == v for k, v in self.sharded_by.items())

    def make_precision(self, precision: str) -> Any:
        """A precision plugin of the strategy's own; None for Lightning's."""
        return None

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """The module's, neither wrapped nor in the run's precision: it sends only its forward pass through both."""
        self.lightning_module.training_step(batch, batch_idx)

    gradients_cross_ranks: Callable[[bool], AbstractContextManager[Any]] = nullcontext
    """Around forward and backward of a micro-batch, the `last` of its step or not: nothing, where no rank waits."""

    def unscale_gradients(self) -> None:
        """Make true gradients of those that fp16 has scaled."""
        if self._scaler is not None:
            self._scaler.unscale_(self.optimizers[0])

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **options: Any) -> Any:
        """Lightning's, but for fp16, where it would unscale the gradients a second time."""
        if self._scaler is None:
            return super().optimizer_step(optimizer, closure, model, **options)  # type: ignore[misc]
        self.precision_plugin._after_closure(self.lightning_module, optimizer)  # the hooks of callbacks
        self._scaler.step(optimizer)
        return self._scaler.update()

    @property
    def _scaler(self) -> Any:
        """The loss scaler of fp16; None in other precisions."""
        return getattr(self.precision_plugin, "scaler", None)

    def made_update(self) -> bool:
        """Whether the last step made an update."""
        return True

    def scaler_state(self) -> dict[str, Any]:
        """State of the loss scale of fp16, if the strategy keeps it and not the precision plugin."""
        return {}

    def load_scaler_state(self, held: Mapping[str, Any]) -> None:
        """Restore what `scaler_state` returned."""

    def reshard(self, model: nn.Module) -> None:
        """Give back weights of other ranks that a forward pass has left here."""

    def allocate_state(self, kinds: Mapping[str, bool]) -> None:
        """Make zero optimizer states, into which a checkpoint is read."""
        allocate_states(self.optimizers[0], kinds)

    def teardown(self) -> None:
        """Tear down the accelerator only: the model is evaluated afterwards."""
        self.precision_plugin.teardown()
        self.accelerator.teardown()  # type: ignore[attr-defined]


def torch_pieces(optimizer: Optimizer, named: Mapping[str, nn.Parameter], *, owned: bool) -> Iterator[Piece]:
    """The pieces of an optimizer whose parameters are whole."""
    for name, parameter in named.items():
        for kind, state in optimizer.state.get(parameter, {}).items():
            if not isinstance(state, Tensor | None):
                raise ConfigError(f"optim: {type(optimizer).__name__} keeps {kind!r} as a number, which is not saved.")
            if state is not None:
                yield Piece(name, kind, 0, state.view(-1), owned, single=state.ndim == 0)


def allocate_states(optimizer: Optimizer, kinds: Mapping[str, bool]) -> None:
    """Zero states for every parameter of a torch optimizer, which makes them only in its first step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            for kind, single in kinds.items():
                if kind not in state and single:
                    on_device = group.get("fused") or group.get("capturable")  # as the optimizers do themselves
                    device = parameter.device if on_device else "cpu"
                    state[kind] = torch.zeros((), dtype=torch.float32, device=device)
                elif kind not in state:
                    state[kind] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
