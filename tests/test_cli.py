"""The command line: lazy commands, exit statuses, and what it says when something is missing."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
import types

import pytest

import gptkern
from gptkern import cli
from gptkern.commands import UserError


@pytest.fixture
def command(monkeypatch):
    """Puts a stand-in module in place of a command's."""

    def install(name: str, run):
        module = types.ModuleType(f"gptkern.commands.{name}")
        module.SUMMARY = cli.COMMANDS[name]
        module.add_arguments = lambda parser: parser.add_argument("--count", type=int, default=3)
        module.run = run
        monkeypatch.setitem(sys.modules, f"gptkern.commands.{name}", module)

    return install


def _raise(error):
    raise error


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_keeps_the_contract(name):
    module = importlib.import_module(f"gptkern.commands.{name}")
    assert cli.COMMANDS[name] == module.SUMMARY
    assert callable(module.add_arguments) and callable(module.run)


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["--help"])
    assert exit.value.code == 0
    output = " ".join(capsys.readouterr().out.split())
    for name, summary in cli.COMMANDS.items():
        assert name in output and summary in output


def test_runs_as_a_module():
    process = subprocess.run([sys.executable, "-m", "gptkern", "--version"], capture_output=True, text=True)
    assert process.returncode == 0
    assert process.stdout.startswith("gptkern ")


def test_no_command_and_unknown_command_exit_with_2(capsys):
    for arguments in ([], ["polish"]):
        with pytest.raises(SystemExit) as exit:
            cli.main(arguments)
        assert exit.value.code == 2
    assert "polish" in capsys.readouterr().err


def test_status_and_options_reach_the_command(command):
    command("train", lambda args: args.count)
    assert cli.main(["train"]) == 3
    assert cli.main(["train", "--count", "7"]) == 7


def test_only_the_chosen_command_is_imported():
    program = (
        "import sys; from gptkern import cli\n"
        "try: cli.main(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in sys.modules if m.startswith('gptkern.commands.')], file=sys.stderr)"
    )
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert process.stderr.strip() == "[]"


def test_help_imports_nothing_that_is_slow():
    """What makes `gptkern COMMAND --help` answer at once: no package but gptkern itself."""
    program = (
        "import sys\nbefore = set(sys.modules)\nfrom gptkern import cli\n"
        "for arguments in [[], *([name] for name in cli.COMMANDS)]:\n"
        "    try: cli.main([*arguments, '--help'])\n    except SystemExit as exit: assert exit.code == 0\n"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before}, file=sys.stderr)"
    )
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert set(process.stderr.split()) - set(sys.stdlib_module_names) == {"gptkern"}
    assert process.stdout.count("usage: gptkern") == 1 + len(cli.COMMANDS)


def test_choices_that_help_lists_are_those_of_the_library():
    from gptkern.commands import options, stages
    from gptkern.models import gpt

    assert tuple(gpt.PRESETS) == options.PRESETS
    assert tuple(stages.PRECISIONS) == options.DTYPES


def test_a_missing_extra_is_named(command, capsys, monkeypatch):
    found = importlib.util.find_spec
    absent = {"rich", "matplotlib"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in absent else found(name, *rest))
    command("demo", lambda args: _raise(ModuleNotFoundError("No module named 'rich.live'", name="rich.live")))
    assert cli.main(["demo"]) == 2
    assert capsys.readouterr().err == "gptkern demo needs rich and matplotlib: install the extra cli (README)\n"


def test_a_missing_module_that_is_no_extra_is_a_defect(command):
    command(
        "demo", lambda args: _raise(ModuleNotFoundError("No module named 'gptkern.nowhere'", name="gptkern.nowhere"))
    )
    with pytest.raises(ModuleNotFoundError):
        cli.main(["demo"])


def test_user_errors_are_one_line(command, capsys):
    command("train", lambda args: _raise(UserError("--text: no such file")))
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err == "gptkern train: --text: no such file\n"


def test_an_error_of_a_forced_backend_is_one_line_and_another_error_a_traceback(command, capsys):
    command("train", lambda args: _raise(gptkern.BackendError("backend 'triton' was asked for and cannot run softmax")))
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err == "gptkern train: backend 'triton' was asked for and cannot run softmax\n"
    command("train", lambda args: _raise(RuntimeError("a defect")))
    with pytest.raises(RuntimeError, match="a defect"):
        cli.main(["train"])


def test_interrupt_has_the_shell_status(command):
    command("train", lambda args: _raise(KeyboardInterrupt()))
    assert cli.main(["train"]) == 130


@pytest.mark.parametrize(
    "arguments",
    [["info"], *(pytest.param([name], marks=pytest.mark.deep) for name in ("check", "train", "demo", "tune", "bench"))],
)
def test_an_interrupt_waits_for_the_import_of_pytorch(arguments, tmp_path):
    program = (
        "import importlib.abc, signal, sys\n"
        "from gptkern import cli\n"
        # What a shell starts in the background has it ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class Finder(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'torch.nn': signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "status = cli.main(sys.argv[1:])\n"
        "sys.exit(status if 'torch.nn.modules.linear' in sys.modules else 'cut off')"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", f"gptkern {arguments[0]}: interrupted\n")


def test_a_reader_that_leaves_is_no_traceback():
    """`gptkern … | head -1`."""
    program = (
        "import sys; from gptkern import cli; from gptkern.commands import info\n"
        "info.run = lambda args: [print('x' * 100, flush=True) for _ in range(10000)] and 0\n"
        "sys.exit(cli.main(['info']))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 1


def test_help_says_defaults_that_say_something(capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "--help"])
    printed = capsys.readouterr().out
    assert "default: None" not in printed and "default: False" not in printed and "out/bench/<device>" in printed
