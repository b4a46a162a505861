"""The CUDA C++ backend for host_path.py."""

LIMIT = 3.5


def prepare() -> str | None:
    return "its launches have no stub yet"


def versions() -> dict[str, str]:
    return {}
