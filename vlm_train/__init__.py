"""Train vision-language models from parts, in stages, by configuration."""

__version__ = "0.1.0"
