"""The checks that every component of a group passes, shipped or somebody's own: `python -m vlm_train.contract`."""
