"""`gptkern info`: what it knows about this machine, with and without Triton."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from gptkern import cli, operators
from gptkern.backends import dispatch
from gptkern.backends.cuda import common, emulated
from gptkern.commands import info


@pytest.fixture(autouse=True)
def _not_emulated(monkeypatch):
    monkeypatch.delenv("GPTKERN_EMULATE_CUDA", raising=False)


def _facts(capsys) -> dict:
    assert cli.main(["info", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_holds_versions_devices_and_backends(capsys):
    facts = _facts(capsys)
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["numpy"] == importlib.metadata.version("numpy")
    assert tuple(facts["operators"]) == operators.NAMES
    assert all(facts["operators"].values()), "an operator has no word about what its kernels cover"
    assert len(facts["devices"]) == 1 + torch.cuda.device_count()
    cpu = facts["devices"][0]
    for operator in operators.NAMES:
        assert cpu["backends"][operator]["torch"] is None
        assert cpu["backends"][operator]["cuda"] == "the input is on the CPU and GPTKERN_EMULATE_CUDA=1 is not set"


def test_the_reason_goes_when_the_interpreter_is_on(capsys, monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    off = _facts(capsys)
    assert "TRITON_INTERPRET=1 is not set" in off["devices"][0]["backends"]["softmax"]["triton"]
    assert off["environment"]["TRITON_INTERPRET"] is None
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    on = _facts(capsys)
    assert on["devices"][0]["backends"]["softmax"]["triton"] is None
    assert on["environment"]["TRITON_INTERPRET"] == "1"


def test_an_operator_whose_kernels_cannot_be_imported_is_told_apart(capsys, monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    load = dispatch.load

    def broken(name, operator):
        if (name, operator) == ("triton", "softmax"):
            raise ImportError("no such kernel")
        return load(name, operator)

    monkeypatch.setattr(dispatch, "load", broken)
    reasons = info._reasons(_facts(capsys)["devices"][0]["backends"])
    assert reasons["triton"] == "softmax: ImportError: no such kernel"
    assert "GPTKERN_EMULATE_CUDA=1 is not set" in reasons["cuda"]


def test_a_variant_stands_with_the_operators_that_have_it(capsys):
    backends = _facts(capsys)["devices"][0]["backends"]
    assert backends["attention"]["torch:cudnn"] == "cuDNN is for NVIDIA GPUs and the input is on cpu"
    assert "torch:cudnn" not in backends["layer_norm"]
    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    heading = next(line for line in lines if "torch:cudnn" in line)
    column = heading.index("torch:cudnn")
    words = {line.split()[0]: line[column:].split()[0] for line in lines if line.startswith(operators.NAMES)}
    assert words == {name: "no" if name == "attention" else "-" for name in operators.NAMES}


def test_text_names_what_is_missing(capsys, monkeypatch):
    monkeypatch.setenv("GPTKERN_BACKEND", "torch")
    assert cli.main(["info"]) == 0
    output = capsys.readouterr().out
    assert "CUDA C++: " in output and "CUDA C++ on the CPU: " in output
    assert "not cuda: the input is on the CPU and GPTKERN_EMULATE_CUDA=1 is not set" in output
    assert "GPTKERN_BACKEND=torch" in output
    assert ("PyTorch sees no GPU." in output) == (not torch.cuda.is_available())


def test_text_and_json_say_what_the_compiled_module_is(capsys, monkeypatch):
    reason = "there are no CUDA kernels in this build: there is no nvcc"
    monkeypatch.setattr(common, "not_built", lambda: reason)
    assert _facts(capsys)["cuda_kernels"] == {"missing": reason}
    assert cli.main(["info"]) == 0
    assert f"CUDA C++: {reason}." in capsys.readouterr().out

    module = types.SimpleNamespace(compiler="nvcc 13.0.88", architectures="80;90a", __file__="/a/_cuda.so")
    monkeypatch.setattr(common, "not_built", lambda: None)
    monkeypatch.setattr(common, "compiled", lambda: module)
    assert _facts(capsys)["cuda_kernels"]["architectures"] == "80;90a"
    assert cli.main(["info"]) == 0
    assert "CUDA C++: built with nvcc 13.0.88 for 80;90a, /a/_cuda.so." in capsys.readouterr().out


def test_a_compiled_module_of_another_tree_is_shown_beside_the_tree_that_is_used(capsys, monkeypatch, tmp_path):
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    for tree in ("on the path", "installed"):
        module = tmp_path / tree / "gptkern" / f"_cuda{suffix}"
        module.parent.mkdir(parents=True)
        module.touch()
    monkeypatch.syspath_prepend(tmp_path / "on the path")
    # As pip notes an editable installation.
    note = tmp_path / "site" / "gptkern-9.dist-info"
    note.mkdir(parents=True)
    (note / "METADATA").write_text("Metadata-Version: 2.1\nName: gptkern\nVersion: 9\n")
    (note / "direct_url.json").write_text(json.dumps({"url": (tmp_path / "installed").as_uri(), "dir_info": {}}))
    monkeypatch.syspath_prepend(tmp_path / "site")
    source = _facts(capsys)["source"]
    modules = [str(tmp_path / tree / "gptkern" / f"_cuda{suffix}") for tree in ("on the path", "installed")]
    assert source["imported"] == str(Path(info.__file__).parents[1]) and set(modules) <= set(source["not_used"])
    assert cli.main(["info"]) == 0
    output = capsys.readouterr().out
    assert f"gptkern is imported from {source['imported']}." in output
    assert all(f"  compiled and not used: {module}" in output for module in modules)


def test_it_says_why_the_emulator_cannot_be_built(capsys, monkeypatch):
    monkeypatch.setattr(emulated, "compiler", lambda: None)
    assert cli.main(["info"]) == 0
    assert "CUDA C++ on the CPU: there is no C++ compiler: install g++ or clang++" in capsys.readouterr().out
    monkeypatch.setattr(emulated, "compiler", lambda: "clang++")
    monkeypatch.setattr(emulated, "missing", lambda: None)
    assert _facts(capsys)["cuda_emulator"] == {"missing": None, "compiler": "clang++"}
    assert cli.main(["info"]) == 0
    assert "CUDA C++ on the CPU: can be built with clang++." in capsys.readouterr().out


def test_works_without_triton_and_rich():
    program = """
import sys
for name in ("triton", "rich"):
    sys.modules[name] = None
from gptkern import cli
sys.exit(cli.main(["info"]))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "not triton: triton is not installed" in done.stdout
