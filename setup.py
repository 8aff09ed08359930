from setuptools import find_namespace_packages, find_packages, setup


def folders(package: str, path: str) -> list[str]:
    """The YAML folder `path` of the checkout and its subfolders, as packages whose root is `package`."""
    return [package, *(f"{package}.{folder}" for folder in find_namespace_packages(path))]


# Not in pyproject.toml, which can either search for packages or name them, but not both.
setup(
    packages=[
        *find_packages(include=["vlm_train", "vlm_train.*", "data_pipelines", "data_pipelines.*"]),
        *folders("vlm_train.conf", "conf"),
        *folders("vlm_train.recipes", "recipes"),
        *folders("data_pipelines.conf", "data_pipelines/conf"),
    ]
)
