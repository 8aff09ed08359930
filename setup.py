from setuptools import find_namespace_packages, find_packages, setup


def folders(name: str) -> list[str]:
    """The YAML folder `name` of the checkout and its subfolders, as packages inside vlm_train."""
    return [f"vlm_train.{name}", *(f"vlm_train.{name}.{folder}" for folder in find_namespace_packages(name))]


# Not in pyproject.toml, which can either search for packages or name them, but not both.
setup(
    packages=[
        *find_packages(include=["vlm_train", "vlm_train.*", "data_pipelines", "data_pipelines.*"]),
        *folders("conf"),
        *folders("recipes"),
    ]
)
