"""The command line: help, exit codes, one line for bad input, a clean end after Ctrl-C."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from permattn import cli
from permattn.backends import BACKENDS
from permattn.cli import app

REAL = "import sys; from permattn.cli import main; sys.exit(main())"


def one_line_of_stderr(capsys) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1 and captured.err.startswith("permattn: ")
    return captured.err


def test_a_real_process_prints_json():
    done = subprocess.run(
        [sys.executable, "-c", REAL, "info", "--json"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["versions"]["permattn"] and report["versions"]["torch"]
    assert set(report["backends"]) == {"cuda", "triton", "cpu", "reference"}
    assert report["backends"]["reference"] is None


def test_info_prints_reasons_as_they_are(monkeypatch, capsys):
    """Extras stand in brackets, as markup does."""
    why = "is not installed (pip install 'permattn[triton]')"
    monkeypatch.setattr(BACKENDS["triton"], "why_not", lambda problem: why)
    assert cli.main(["info"]) == 0
    assert "permattn[triton]" in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize("command", [[], ["info"], ["demo"]], ids=lambda c: c[0] if c else "root")
def test_help_says_what_every_option_does(command, capsys):
    assert cli.main([*command, "--help"]) == 0
    text = capsys.readouterr().out
    wanted = {
        "": ("info", "demo", "bench"),
        "info": ("--explain", "--heads", "--kv-heads", "--tokens", "--head-dim", "--json"),
        "demo": (
            "--video", "--model", "--frames", "--tokens", "--device", "--dtype", "--backend",
            "--out", "--json",
        ),
    }[command[0] if command else ""]  # fmt: skip
    for word in wanted:
        assert word in text


def test_explain_names_backend_reasons_and_cost(capsys):
    argv = ["info", "--json", "--explain", "--heads", "8", "--kv-heads", "2", "--tokens", "1000"]
    assert cli.main([*argv, "--head-dim", "64", "--density", "0.25"]) == 0
    facts = json.loads(capsys.readouterr().out)["explain"]
    pairs = 1000 * 1001 // 2
    assert facts["dense_flops"] == pairs * 4 * 64 * 8
    assert facts["sparse_flops"] == facts["dense_flops"] // 4
    assert facts["why_not"][facts["backend"]] is None
    assert "CUDA" in facts["why_not"]["triton"]


def test_explain_of_a_format(capsys):
    argv = ["info", "--json", "--explain", "--quant", "int8+int8"]
    assert cli.main(argv) == 0
    facts = json.loads(capsys.readouterr().out)["explain"]
    assert facts["backend"] in ("cpu", "reference") and facts["why_not"]["reference"] is None
    assert cli.main([*argv, "--backward"]) == 0
    facts = json.loads(capsys.readouterr().out)["explain"]
    assert facts["why_not"]["reference"] == "quantised attention has no gradients"


def test_explain_prints_tables(capsys):
    assert cli.main(["info", "--explain", "--dtype", "fp32", "--head-dim", "300"]) == 0
    text = capsys.readouterr().out
    assert "reference" in text and "TFLOP" in text and "300" in text


BAD = {
    "unknown-command": (["prefill"], "prefill"),
    "unknown-option": (["info", "--nope"], "--nope"),
    "unknown-format": (["info", "--quant", "int2"], "--quant: wants 'none' or one of"),
    "not-a-number": (["info", "--tokens", "many"], "--tokens"),
    "below-minimum": (["demo", "--tokens", "3"], "--tokens"),
    "heads": (["info", "--heads", "5", "--kv-heads", "4"], "--heads"),
    "dtype": (["info", "--dtype", "int3"], "bf16, fp16 or fp32"),
    "device": (["info", "--device", "tpu"], "cpu, cuda"),
    "demo-dtype": (["demo", "--dtype", "int3"], "bf16, fp16 or fp32"),
    "demo-backend": (["demo", "--backend", "cudnn"], "--backend"),
    "demo-backend-cannot": (["demo", "--backend", "triton"], "CUDA"),
    "demo-device": (["demo", "--device", "cuda:99"], "CUDA devices"),
}


@pytest.mark.parametrize("argv, hint", BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_and_exit_code_2(argv, hint, capsys):
    assert cli.main(argv) == 2
    assert hint in one_line_of_stderr(capsys)


def test_bench_without_the_repository(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("permattn.cli.bench._ROOT", tmp_path)
    assert cli.main(["bench", "--quick"]) == 2
    assert "clone the repository" in one_line_of_stderr(capsys)


def test_bench_gets_its_arguments(capsys):
    assert cli.main(["bench", "--list"]) == 0
    assert "bf16-d64" in capsys.readouterr().out


def test_a_missing_library_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "permattn.cli.app", None)
    monkeypatch.delattr(cli, "app", raising=False)
    assert cli.main(["info"]) == 2
    assert "pip install 'permattn[cli]'" in one_line_of_stderr(capsys)


def test_ctrl_c_ends_with_130(monkeypatch, capsys):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("permattn.cli.info.show", interrupted)
    assert cli.main(["info"]) == 130
    assert one_line_of_stderr(capsys) == "permattn: interrupted\n"


def test_our_own_bugs_keep_their_traceback(monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr("permattn.cli.info.show", broken)
    with pytest.raises(AssertionError, match="a bug"):
        app.run(["info"])
