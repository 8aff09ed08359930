"""What writes a model for another library, and what reads one of its folders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from vlm_train.data.processor import Processor


@runtime_checkable
class Exporter(Protocol):
    """Writes models in one format. Of the configured exporters the first without problems writes a run."""

    def problems(self, model: Any) -> list[str]:
        """Why the format cannot express `model`, each under the setting that decides it; none: it can.

        No weight is read: the model may be on the meta device. Any model may be asked about.
        """

    def write(self, model: Any, processor: Processor, folder: Path) -> str:
        """Write a model without problems, in evaluation mode, into an empty folder.

        Returns:
            What the folder has besides the weights, in a few words for the terminal.
        """

    def verify(self, model: Any, folder: Path) -> float:
        """Read the folder back as its users will, and compare what it computes with `model`.

        Returns:
            The largest difference, relative to the largest number.

        Raises:
            AssetError: the difference is too large, or a weight is missing.
        """


@runtime_checkable
class Importer(Protocol):
    """Makes a run of a folder in one format. Of the configured importers the first without problems is taken."""

    def problems(self, folder: Path) -> list[str]:
        """Why `folder` cannot be read, that is, is not of this format; none: it can. Reads no weight."""

    def adapt(self, cfg: DictConfig, folder: Path) -> None:
        """Change a run's configuration so that the model which is built of it has room for what the folder holds."""

    def read(self, model: Any, folder: Path) -> None:
        """Copy the folder's weights into the built model.

        Raises:
            ConfigError: the format has no such model. AssetError: weights are missing or of another shape.
        """
