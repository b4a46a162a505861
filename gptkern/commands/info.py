"""`gptkern info`: versions, devices, and for each operator the backends that can run it here, or why not."""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.metadata
import json
import os
import platform
import sys
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from gptkern.commands import tables
from gptkern.commands.interrupts import import_torch

SUMMARY = "what this machine has: versions, device, backends, and why one is missing"

# The variables that change what runs.
VARIABLES = ("GPTKERN_BACKEND", "GPTKERN_CACHE", "TRITON_INTERPRET", "GPTKERN_EMULATE_CUDA", "CUDA_VISIBLE_DEVICES")

GIBIBYTE = 1024**3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> int:
    facts = gathered()
    if args.json:
        print(json.dumps(facts, indent=1))
    else:
        _show(facts)
    return 0


def gathered() -> dict[str, Any]:
    """What `gptkern info --json` prints."""
    import_torch()
    import torch

    from gptkern.operators import NAMES, problem

    devices = [_device(torch.device("cpu"))]
    devices += [_device(torch.device("cuda", index)) for index in range(torch.cuda.device_count())]
    for device in devices:
        device["backends"] = _backends(torch.device(device["name"]))
    devices[0]["products"] = {name: told for name in NAMES if (told := _on_this_cpu(name))}
    return {
        "versions": _versions(torch),
        "environment": {name: os.environ.get(name) for name in VARIABLES},
        "cuda_kernels": _cuda_kernels(),
        "source": _source(),
        "cuda_emulator": _cuda_emulator(),
        "forced_backend": os.environ.get("GPTKERN_BACKEND") or None,
        "operators": {operator: problem(operator).coverage for operator in NAMES},
        "devices": devices,
    }


def _cuda_kernels() -> dict[str, str | None]:
    """Of the compiled module: what it is, or why there is none; whether a GPU can run it is the GPU's matter."""
    from gptkern.backends.cuda import common

    missing = common.not_built()
    if missing is not None:
        return {"missing": missing}
    module = common.compiled()
    return {
        "missing": None,
        "compiler": module.compiler,
        "architectures": module.architectures,
        "path": module.__file__,
    }


def _source() -> dict[str, Any]:
    """The folder that gptkern is imported from, and the compiled modules that are there and are not used."""
    from gptkern.backends.cuda import common

    here = Path(__file__).resolve().parents[1]
    built = [path for folder in (here, *_other_folders(here)) for path in _modules(folder)]
    used = common.compiled().__file__ if common.not_built() is None else None
    return {"imported": str(here), "not_used": [str(path) for path in built if str(path) != used]}


def _other_folders(here: Path) -> list[Path]:
    """Where else a gptkern is: on the path of imports, and where pip has installed it, or was told to look for it."""
    folders = [Path(entry or os.curdir, "gptkern") for entry in sys.path]
    for distribution in importlib.metadata.distributions(name="gptkern"):
        folders.append(Path(distribution.locate_file("gptkern")))
        url = urllib.parse.urlparse(json.loads(distribution.read_text("direct_url.json") or "{}").get("url", ""))
        if url.scheme == "file":
            folders.append(Path(urllib.request.url2pathname(url.path), "gptkern"))
    return [folder for folder in dict.fromkeys(folder.resolve() for folder in folders) if folder != here]


def _modules(folder: Path) -> list[Path]:
    paths = (folder / f"_cuda{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return [path for path in paths if path.is_file()]


def _cuda_emulator() -> dict[str, str | None]:
    from gptkern.backends.cuda import emulated

    return {"missing": emulated.missing(), "compiler": emulated.compiler()}


def _versions(torch) -> dict[str, str | None]:
    from gptkern.version import __version__

    return {
        "gptkern": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "triton": _installed("triton"),
        "numpy": _installed("numpy"),
        "CUDA runtime": torch.version.cuda,
        "CUDA driver": _driver(torch),
    }


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver(torch) -> str | None:
    """The newest CUDA that the driver supports."""
    from gptkern.backends.cuda import common

    version = None if torch.version.cuda is None else common.driver_cuda()
    return None if version is None else f"{version[0]}.{version[1]}"


def _device(device) -> dict[str, Any]:
    import torch

    if device.type == "cpu":
        return {"name": "cpu", "model": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": str(device),
        "model": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "memory GiB": round(properties.total_memory / GIBIBYTE, 1),
        "multiprocessors": properties.multi_processor_count,
        "tables": _tables(device),
    }


def _on_this_cpu(operator: str) -> list[str]:
    """What an operator found out about PyTorch's own operators on this CPU, if it has to."""
    from gptkern import operators

    tell = getattr(operators.contract(operator), "on_this_cpu", None)
    return [] if tell is None else tell()


def _tables(device) -> str:
    """Whose tiles and preferred backends are in force on a GPU; `gptkern tune --show` prints them."""
    from gptkern.backends.tables import user

    found = user.identify(device)
    file = None if found is None else user.read(found)
    if file is not None and file.content is not None:
        return f"measured by you on {file.content['date']}, {file.path}"
    ignored = "" if file is None or file.ignored is None else f"; {file.path} is ignored: {file.ignored}"
    return f"gptkern's own{ignored}"


def _backends(device) -> dict[str, dict[str, str | None]]:
    """operator -> backend or variant that it has -> None where that can run, else the reason."""
    from gptkern.backends import dispatch
    from gptkern.backends.tables import orders
    from gptkern.operators import NAMES

    return {
        operator: {name: dispatch.missing(name, operator, device) for name in _in_order(orders.names(operator))}
        for operator in NAMES
    }


def _in_order(names) -> list[str]:
    """The backends as everywhere, the variants of each behind it."""
    from gptkern.backends import dispatch

    return sorted(names, key=lambda name: (dispatch.BACKENDS.index(name.partition(":")[0]), name))


def _show(facts: dict[str, Any]) -> None:
    rows = [[name, version or "none"] for name, version in facts["versions"].items()]
    tables.show("Versions", ("", "version"), rows)
    print()
    apart = ("backends", "tables", "products")
    for device in facts["devices"]:
        described = ", ".join(f"{value} {name}" for name, value in list(device.items())[2:] if name not in apart)
        print(f"{device['name']}: {device['model']} ({described})")
        for operator, told in device.get("products", {}).items():
            for line in told:
                print(f"  {operator} {line}")
        if "tables" in device:
            print(f"  tiles and preferred backends: {device['tables']}")
    if len(facts["devices"]) == 1:
        print("PyTorch sees no GPU.")
    built = facts["cuda_kernels"]
    described = built["missing"] or f"built with {built['compiler']} for {built['architectures']}, {built['path']}"
    print(f"CUDA C++: {described}.")
    print(f"gptkern is imported from {facts['source']['imported']}.")
    for path in facts["source"]["not_used"]:
        print(f"  compiled and not used: {path}")
    emulator = facts["cuda_emulator"]
    print(f"CUDA C++ on the CPU: {emulator['missing'] or 'can be built with ' + emulator['compiler']}.")
    for name, value in facts["environment"].items():
        if value is not None:
            print(f"{name}={value}")
    for device in facts["devices"]:
        print()
        backends = _in_order({name for reasons in device["backends"].values() for name in reasons})
        rows = [
            [operator, *(_word(reasons, name) for name in backends), facts["operators"][operator]]
            for operator, reasons in device["backends"].items()
        ]
        tables.show(f"Backends on {device['name']}", ("operator", *backends, "what the kernels cover"), rows)
        for backend, reason in _reasons(device["backends"]).items():
            print(f"  not {backend}: {reason}")


def _word(reasons: dict[str, str | None], backend: str) -> str:
    """ "yes", "no", or "-" of a variant that the operator does not have."""
    return "-" if backend not in reasons else "no" if reasons[backend] else "yes"


def _reasons(backends: dict[str, dict[str, str | None]]) -> dict[str, str]:
    """backend -> why it cannot run; with the operators' names where not all that have it have the same reason."""
    told = {}
    for name in _in_order({name for reasons in backends.values() for name in reasons}):
        having = {operator: reasons[name] for operator, reasons in backends.items() if name in reasons}
        reasons = {operator: reason for operator, reason in having.items() if reason}
        if not reasons:
            continue
        if len(set(reasons.values())) == 1 and len(reasons) == len(having):
            told[name] = next(iter(reasons.values()))
        else:
            told[name] = "; ".join(f"{operator}: {reason}" for operator, reason in reasons.items())
    return told
