"""Packages and the kernels/ -> d2v_fast.kernels mapping; the metadata is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["d2v_fast", "d2v_fast.*"]), "d2v_fast.kernels"],
    package_dir={"d2v_fast.kernels": "kernels"},
)
