"""The build backend that pip calls: setuptools' own, with requirements that depend on the machine.

A build of the CUDA kernels needs pybind11, ninja and nvcc. pip installs what is missing of them into the build's own
environment; a build without CUDA kernels downloads none of it. (PEP 517, PEP 660)
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import build_sdist, get_requires_for_build_sdist

from building import toolchain

__all__ = [
    "build_editable", "build_sdist", "build_wheel", "get_requires_for_build_editable", "get_requires_for_build_sdist",
    "get_requires_for_build_wheel", "prepare_metadata_for_build_editable", "prepare_metadata_for_build_wheel",
]  # fmt: skip

prepare_metadata_for_build_wheel = build_meta.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable
build_editable = build_meta.build_editable


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    return [*_requirements(), *build_meta.get_requires_for_build_wheel(config_settings)]


def get_requires_for_build_editable(config_settings=None) -> list[str]:
    return [*_requirements(), *build_meta.get_requires_for_build_editable(config_settings)]


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None) -> str:
    # setuptools packs whatever an earlier build left there: a module of another version, a file deleted since.
    for left in Path("build").glob("lib*"):
        shutil.rmtree(left)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def _requirements() -> tuple[str, ...]:
    try:
        plan = toolchain.plan(fetching=True)
        if plan.forced:
            plan.check()
        return plan.requirements
    except toolchain.BuildError as error:
        sys.exit(f"gptkern: {error}")
