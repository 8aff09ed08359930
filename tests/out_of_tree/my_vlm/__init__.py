"""A package of one's own: parts, a family, an objective, a metric and a data source that vlm_train knows nothing of.

Every file here stands next to the YAML file in `conf/` that names it. From the folder that holds this one:

    python -m vlm_train --config-dir my_vlm/conf 'allow_targets=[my_vlm.]' recipe=easyvqa_stage1 connector=my_resampler
    python -m data_pipelines.build --config-dir my_vlm/conf 'allow_targets=[my_vlm.]' source=my_notes folder=notes ...
"""
