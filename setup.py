"""The one thing `pyproject.toml` cannot say: the folder `kernels/` is installed as `cellattn.kernels`."""

from setuptools import setup

setup(
    package_dir={"cellattn": "cellattn", "cellattn.kernels": "kernels"},
    packages=["cellattn", "cellattn.data", "cellattn.nn", "cellattn.ops", "cellattn.kernels"],
    package_data={"cellattn": ["py.typed"]},
)
