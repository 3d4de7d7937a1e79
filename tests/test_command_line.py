"""`unsloth-ext` as a user types it."""

import json
import subprocess
import sys

import pytest

from unsloth_ext.__main__ import main


def test_no_command_is_a_usage_error_that_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as exit:
        main([])
    assert exit.value.code == 2 and "COMMAND" in capsys.readouterr().err


def test_status_without_an_import(capsys):
    assert main(["status", "--no-import", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {"loss.unread_keywords", "tools.cpu_pad_token", "tools.empty_tool_calls"} <= {row["id"] for row in rows}
    code = "import sys; from unsloth_ext.__main__ import main; main(['status', '--no-import']); print('MODULES', *sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    modules = modules.rpartition("MODULES")[2].split()
    assert "unsloth_ext" in modules and "torch" not in modules


def test_errors_say_what_to_do(capsys):
    assert main(["patches", "apply", "--unsloth", "/no/such/folder"]) == 2
    message = capsys.readouterr().err
    assert (
        message.startswith("unsloth-ext: ") and "/no/such/folder" in message and len(message.strip().splitlines()) >= 2
    )


def test_the_module_and_the_command_are_the_same():
    done = subprocess.run([sys.executable, "-m", "unsloth_ext", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("unsloth_ext ")
