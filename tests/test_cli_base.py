"""The command line's frame: help, exit codes, --json, methods, run, the install check."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mllm import cli as cli_package
from mllm.cli import _common, app
from mllm.errors import DataError, PlanError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def cli():
    return CliRunner()


@pytest.fixture
def probe(monkeypatch):
    """A command `demo` whose body the test chooses."""
    module = types.ModuleType("mllm.cli.demo")

    def install(body):
        def command(json: _common.JsonOption = False) -> None:
            """Probe."""
            _common.run_command("demo", body, json, render=lambda data: print("shown", data))

        module.command = command
        monkeypatch.setattr(cli_package.importlib, "import_module", lambda name: module)
        monkeypatch.setattr(cli_package.LazyGroup, "list_commands", lambda self, ctx: ["demo"])

    return install


def fail(error):
    def body():
        raise error

    return body


def test_help_imports_no_torch_and_lists_commands():
    code = (
        "import sys\n"
        "from mllm.cli import app\n"
        "try: app(['--help'])\n"
        "except SystemExit as e: assert e.code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "methods" in done.stdout and "bench" in done.stdout


def test_every_listed_command_loads_and_shows_an_example(cli):
    names = app_commands()
    assert {"methods", "run", "bench"} <= set(names) <= set(cli_package.SUMMARIES)
    for name in names:
        pytest.importorskip(f"mllm.cli.{name}")
        result = cli.invoke(app, [name, "--help"])
        assert result.exit_code == 0, (name, result.output)
        assert "--traceback" in result.output or "Commands" in result.output


def app_commands():
    import typer

    return typer.main.get_command(app).list_commands(None)


def test_data_is_one_object_on_stdout_and_noise_goes_to_stderr(cli, probe):
    def body():
        print("noise")
        return {"n": 1}

    probe(body)
    result = cli.invoke(app, ["demo", "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {
        "schema": 1, "command": "demo", "ok": True, "data": {"n": 1},
    }  # fmt: skip
    assert "noise" in result.stderr
    assert "shown {'n': 1}" in cli.invoke(app, ["demo"]).stdout


def test_bad_input_is_one_line_and_exit_code_2(cli, probe):
    error = PlanError("keep=0 keeps\nnothing", argument="keep", given=0, expected="1 or more")
    probe(fail(error))
    result = cli.invoke(app, ["demo"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "mllm demo: error: keep=0 keeps nothing; expected 1 or more\n"
    result = cli.invoke(app, ["demo", "--json"])
    assert result.exit_code == 2
    payload = json.loads(result.stdout)
    assert payload == {"schema": 1, "command": "demo", "ok": False, "error": error.as_dict()}
    assert payload["error"]["given"] == "0"


@pytest.mark.parametrize(
    ("error", "code"),
    [(RuntimeError("boom"), 1), (KeyboardInterrupt(), 130), (SystemExit(143), 143)],
)
def test_exit_codes(cli, probe, error, code):
    probe(fail(error))
    result = cli.invoke(app, ["demo"])
    assert result.exit_code == code
    assert "Traceback" not in result.stderr
    if code == 1:
        assert "boom" in result.stderr and "--traceback" in result.stderr
        assert "Traceback" in cli.invoke(app, ["demo", "--traceback"]).stderr
        payload = json.loads(cli.invoke(app, ["demo", "--json"]).stdout)
        assert payload["error"]["type"] == "RuntimeError"


def test_wrong_usage_honours_json(cli):
    result = cli.invoke(app, ["methods", "--jsn", "--json"])
    assert result.exit_code == 2
    error = json.loads(result.stdout)["error"]
    assert error["type"] == "UsageError" and error["argument"] == "--jsn"


def test_an_unknown_command_names_the_nearest(cli):
    result = cli.invoke(app, ["benhc"])
    assert result.exit_code == 2 and "'bench'" in result.stderr


def test_sigterm_exits_143():
    code = (
        "import os, signal, types\n"
        "from mllm import cli\n"
        "from mllm.cli import methods\n"
        "methods._methods = lambda: os.kill(os.getpid(), signal.SIGTERM)\n"
        "import sys; sys.argv = ['mllm', 'methods']\n"
        "cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 128 + signal.SIGTERM and done.stderr == ""


def test_methods_table_and_json(cli):
    payload = json.loads(cli.invoke(app, ["methods", "--json"]).stdout)
    rows = {row["name"]: row for row in payload["data"]}
    assert {"random", "stride", "avgpool", "downsample", "visionzip", "divprune", "fastv"} <= set(
        rows
    )
    for row in rows.values():
        assert {
            "name", "stage", "site", "reads", "actions", "trained", "paper", "licence_note",
            "params", "positions", "identity", "oracle", "backends",
        } <= set(row)  # fmt: skip
        assert all({"name", "type", "default"} == set(param) for param in row["params"])
    assert "visionzip" in cli.invoke(app, ["methods"]).stdout


def test_files_are_written_whole_or_not_at_all(tmp_path):
    target = tmp_path / "out.json"
    _common.check_writable(target)
    assert not list(tmp_path.iterdir())
    _common.write_text(target, "first")
    assert target.read_text() == "first" and list(tmp_path.iterdir()) == [target]
    for write in (_common.check_writable, lambda path: _common.write_text(path, "x")):
        with pytest.raises(DataError, match="missing"):
            write(tmp_path / "missing" / "out.json")


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    """An untrained copy of the embedded model's architecture on disk, and a picture."""
    from PIL import Image

    from mllm.training import tiny

    folder = tmp_path_factory.mktemp("model")
    processor = tiny.new_processor()
    processor.save_pretrained(folder)
    tiny.new_model(processor.tokenizer).save_pretrained(folder)
    Image.new("RGB", (64, 48), "red").save(folder / "picture.png")
    return folder


def test_run_compares_both(cli, random_model):
    words = ["run", str(random_model / "picture.png"), "What colour?", "--model", str(random_model)]
    words += ["--plan", "visionzip:keep=64+fastv:layer=2:keep=0.5", "--max-new-tokens", "3"]
    result = cli.invoke(app, [*words, "--pairs", "1", "--device", "cpu", "--json"])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)["data"]
    assert (data["visual_tokens"], data["kept_llm"]) == (576, 64)
    assert data["visual_avg"] == pytest.approx((2 * 64 + 6 * 32) / 8)
    assert data["prefill_flops"] < data["baseline_prefill_flops"]
    assert data["kv_bytes"] < data["baseline_kv_bytes"]
    assert data["prefill_s"]["pairs"] == 1 and min(data["prefill_s"].values()) > 0
    assert set(data["answers"]) == {"unpatched", "patched"}
    shown = cli.invoke(app, [*words, "--pairs", "0"])
    assert shown.exit_code == 0 and "visual tokens into the LLM" in shown.stdout


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["{model}/config.json", "--plan", "random:keep=4"], "config.json"),
        (["missing.png", "--plan", "random:keep=4"], "missing.png"),
        (["{picture}", "--plan", "fastw:keep=4"], "fastw"),
        (["{picture}", "--plan", "random:kep=4"], "kep"),
        (["{picture}", "--plan", "random:keep=0"], "keep"),
        (["{picture}", "--plan", "random:keep=577", "--model", "{model}"], "577"),
        (["{picture}", "--plan", "fastv:layer=99:keep=0.5", "--model", "{model}"], "layer"),
        (["{picture}", "--plan", "random:keep=4", "--model", "{model}/no"], "no"),
        (["{picture}", "--plan", "random:keep=4", "--dtype", "int3"], "int3"),
        (["{picture}", "--plan", "random:keep=4", "--device", "toaster"], "toaster"),
        (["{picture}"], "--plan"),
    ],
)
def test_run_refuses_bad_input(cli, random_model, words, part):
    names = {"picture": random_model / "picture.png", "model": random_model}
    result = cli.invoke(app, ["run", *(word.format(**names) for word in words)])
    assert result.exit_code == 2, result.output
    assert part in result.stderr and "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("mllm run: error:")]
    assert len(errors) == 1 and result.stderr.endswith(errors[0] + "\n")


def test_install_check_names_another_owner_of_the_import_name(tmp_path):
    foreign = tmp_path / "foreign"
    (foreign / "mllm").mkdir(parents=True)
    (foreign / "mllm" / "__init__.py").touch()
    info = foreign / "other_mllm-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-mllm\nVersion: 1.0\n")
    (info / "top_level.txt").write_text("mllm\n")
    script = ROOT / "scripts" / "check_import_name.py"
    code = f"import runpy, sys; sys.path.insert(0, {str(foreign)!r}); "
    code += f"runpy.run_path({str(script)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "other-mllm" in done.stderr
    assert subprocess.run([sys.executable, "-I", str(script)]).returncode == 0
