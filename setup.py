"""Build script: maps the two source roots; the native library is added below."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages("python"), "permattn.triton_kernels"],
    package_dir={"": "python", "permattn.triton_kernels": "triton_kernels"},
)
