"""The command line as such: what it imports, its streams and its exit codes."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from conftest import Result, read_jsonl, runner, start, wait
from typer.main import get_command
from zygote import fork

from s2dcli import help
from s2dcli.cli import app, main

HEAVY = [
    "torch",
    "transformers",
    "vllm",
    "datasets",
    "accelerate",
    "math_verify",
    "peft",
    "matplotlib",
    "sympy",
    "click",
    "pyarrow",
    "numpy",
]
COMMANDS = ["rollout", "verify", "grpo", "fkl-warmup", "opd", "eval", "prepare", "score", "probe", "report", "compare", "lineage"]

PROBE = """
import sys
from s2dcli.cli import main
sys.argv = ["s2d", *{arguments!r}]
try:
    main()
finally:
    print("HEAVY", *[name for name in {heavy!r} if name in sys.modules], file=sys.stderr)
"""


def probe(*arguments: str) -> subprocess.CompletedProcess:
    code = PROBE.format(arguments=list(arguments), heavy=HEAVY)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *[[command, "--help"] for command in COMMANDS]])
def test_help_imports_nothing_heavy(arguments):
    result = probe(*arguments)
    assert result.returncode == 0, result.stderr
    assert result.stdout
    assert result.stderr.splitlines()[-1] == "HEAVY"


def test_file_commands_never_import_torch(tmp_path, toy, s2d):
    problems = toy / "problems" / "validation.jsonl"
    assert probe("report", str(tmp_path / "nothing")).stderr.splitlines()[-1] == "HEAVY"
    rolled = s2d("rollout", "-m", toy / "student", problems, "-n", 1, "--max-tokens", 16)
    (tmp_path / "rollouts.jsonl").write_bytes(rolled.out)
    verified = probe("verify", str(tmp_path / "rollouts.jsonl"), "-o", str(tmp_path / "graded.jsonl"))
    assert verified.returncode == 0, verified.stderr
    evaluated = probe("eval", "--rollouts", str(tmp_path / "graded.jsonl"))
    assert evaluated.returncode == 0, evaluated.stderr
    traced = probe("lineage", str(toy / "student"))
    compared = probe("compare", str(tmp_path / "graded.jsonl"), str(tmp_path / "graded.jsonl"))
    unlike = probe("compare", "--settings", str(tmp_path / "graded.jsonl"), str(tmp_path / "graded.jsonl"))
    assert (traced.returncode, compared.returncode, unlike.returncode) == (0, 0, 0)
    for result in (verified, evaluated, traced, compared, unlike):
        assert result.stderr.splitlines()[-1] == "HEAVY"


def test_help_shows_the_stages_first_in_two_panels():
    text = subprocess.run([sys.executable, "-m", "s2dcli", "--help"], capture_output=True, text=True, check=True).stdout
    assert 0 < text.index("Stages") < text.index("rollout") < text.index("Helpers") < text.index("prepare")


def test_a_misspelt_option_is_a_usage_error_that_names_the_right_one():
    result = subprocess.run([sys.executable, "-m", "s2dcli", "rollout", "--modle", "x"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "--model" in result.stderr
    assert result.stdout == ""


def cli(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "s2dcli", *arguments], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


@pytest.fixture
def called(capsys, monkeypatch):
    """Run `s2d ARGS` in this process, for what ends before a command's body: help and usage errors."""

    def run(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["s2d", *arguments])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        return Result(code, out.encode(), err)

    return run


def test_short_forms_of_version_and_help(called):
    assert called("-V").out.startswith(b"s2d ")
    assert called("help", "grpo").out == called("grpo", "--help").out
    assert called("help").out == called("--help").out == called().out


def test_help_shows_what_most_need_and_says_how_to_see_the_rest(called, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    short, whole = (called("grpo", wanted).out.decode() for wanted in ("--help", "--help-all"))
    named, all_named = (set(re.findall(r"^  (-.*?)(?:  |$)", text, re.M)) for text in (short, whole))
    assert named < all_named
    assert len(named) < 40 < len(all_named)
    assert len(short.splitlines()) <= 110
    assert f"{len(all_named) - len(named)} more options: s2d grpo --help-all" in short
    assert "--help-all" not in called("compare", "--help").out.decode()  # shows all there is


def test_the_options_shown_by_help_exist(called):
    root = get_command(app)
    names = {option.name for command in root.commands.values() for option in command.params} | {"help"}
    assert set(help.COMMON.split()) <= names
    typed = {name for command in root.commands.values() for option in command.params for name in (*option.opts, option.metavar)}
    for entry in help._MEANT.split(";"):
        assert set(entry.split(":")[0].split()) & {*typed, "metrics.jsonl"}, entry
    for entry in help._MEANT_COMMANDS.split(";"):
        assert entry.split()[0].rstrip(":") in root.commands


@pytest.mark.parametrize("width", ["50", "80", "120"])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_cuts_no_name_and_breaks_no_value_at_any_width(called, command, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", width)
    text = called(command, "--help-all").out.decode()
    for option in get_command(app).commands[command].params:
        for name in () if option.name == "help_all" else option.opts if option.opts[0].startswith("-") else [option.metavar]:
            assert re.search(rf"^  (-\w, )?{re.escape(name)}(\b|\.\.\.)", text, re.M), name
        if choices := option.type_descriptor.choices:
            assert "|".join(choices) in text
    assert not re.search(r"<\w+( range)?>|--no-(?!card)|…|[╭│]", text)
    examples = text.split("Examples:\n")[1]
    assert len(re.findall(r"^  s2d ", examples, re.M)) == 2
    if width != "50":
        assert max(map(len, text.splitlines())) <= int(width)


def test_panels_stand_in_the_order_of_use(called):
    text = called("grpo", "--help").out.decode()
    titles = re.findall(r"^(\w+):$", text, re.M)
    assert titles[:2] == ["Arguments", "Options"]
    assert titles[-3:] == ["Engine", "General", "Examples"]
    assert titles.index("Sampling") < titles.index("Training") < titles.index("Output")


def test_help_is_plain_where_nobody_can_see_colours(monkeypatch):
    import pty

    def shown(**environment: str) -> bytes:
        controller, terminal = pty.openpty()
        subprocess.run(
            [sys.executable, "-m", "s2dcli", "compare", "--help"], stdout=terminal, check=True, env={**os.environ, **environment}
        )
        os.close(terminal)
        text = os.read(controller, 1 << 16)
        os.close(controller)
        return text

    assert b"\x1b[" in shown(TERM="xterm", NO_COLOR="")
    assert b"\x1b" not in shown(TERM="xterm", NO_COLOR="1")
    assert b"\x1b" not in shown(TERM="dumb")
    assert "\x1b" not in cli("compare", "--help").stdout


def test_help_in_an_encoding_without_our_characters():
    for arguments in (["--help"], ["eval", "--help"], ["grpo", "--help-all"]):
        result = cli(*arguments, PYTHONIOENCODING="ascii")
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.isascii()


USAGE_ERRORS = {
    "rollout": "missing -m, --model CKPT; see s2d rollout --help",
    "lineage": "missing PATH; see s2d lineage --help",
    "rollout -m": "option '-m' requires an argument",
    "rollout -m x --overwrite=3": "option '--overwrite' does not take a value",
    "rollout -m x --temperature -1": "--temperature -1: at least 0 is needed",
    "rollout -m x --temperature abc": "--temperature abc: not a number",
    "rollout -m x --top-p 3": "--top-p 3: not between 0 and 1",
    "rollout -m x --max-tokens 3.5": "--max-tokens 3.5: not a whole number",
    "rollout -m x --max-tokens 99999999999999999999": "--max-tokens 99999999999999999999: too large",
    "grpo -m x --lr inf": "--lr inf: not a finite number",
    "grpo -m x --lr nan": "--lr nan: at least 0 is needed",
    "verify --timeout inf": "--timeout inf: not between 0.1 and 86400",
    "grpo -m x --loss grp": "--loss grp: not one of grpo, dr-grpo, dapo, gspo, cispo; did you mean grpo?",
    "grpo -m x a b": "unexpected argument b; usage: s2d grpo --model CKPT [OPTIONS] [PROBLEMS]",
    "grpo -m x a b c": "unexpected arguments b c; usage: s2d grpo --model CKPT [OPTIONS] [PROBLEMS]",
    "grpo -m x --save-every k": "--save-every: 'k' is neither a number of steps, 50, nor of minutes, 30m",
    "gpro": "no command 'gpro'; did you mean grpo?",
    "sft": "no command 'sft'; did you mean fkl-warmup --hard-labels?",
    "zzz": "no command 'zzz'; s2d --help lists them",
    "--foo": "no option --foo; see s2d --help",
    "grpo --modle x": "no option --modle; did you mean --model?",
    "grpo --zzz x": "no option --zzz; see s2d grpo --help-all",
    "opd --beta 0.1": "no option --beta; use --jsd-beta",
}
MEANINGS = {
    "grpo": {
        "learning-rate": "--lr",
        "learning_rate": "--lr",
        "actor.optim.lr": "--lr",
        "num-generations": "-n",
        "n": "-n",
        "batch-size": "--problems-per-step or --mini-batch-size",
        "beta": "--kl-coef",
        "max-new-tokens": "--max-tokens",
        "max-completion-length": "--max-tokens",
        "max-length": "--max-tokens",
        "output-dir": "-o",
        "model-name-or-path": "--model",
        "num-train-epochs": "--epochs",
        "dataset": "PROBLEMS or --rollouts",
        "save-steps": "--save-every",
        "per-device-train-batch-size": "--tokens-per-batch",
        "gradient-accumulation-steps": "--tokens-per-batch",
        "bf16": "--dtype",
    },
    "eval": {"num-generations": "-k", "n": "-k"},
    "verify": {"dataset": "ROLLOUTS"},
    "opd": {"model-name-or-path": "--student"},
}


@pytest.mark.parametrize("line", USAGE_ERRORS)
def test_a_usage_error_is_one_line_that_says_what_to_type(called, line):
    result = called(*line.split())
    assert (result.code, result.out, result.err) == (2, b"", f"error: {USAGE_ERRORS[line]}\n")


@pytest.mark.parametrize(("command", "typed"), [(command, typed) for command, names in MEANINGS.items() for typed in names])
def test_an_option_of_other_tools_leads_to_ours(called, command, typed):
    result = called(command, f"--{typed}", "1")
    assert (result.code, result.err) == (2, f"error: no option --{typed}; use {MEANINGS[command][typed]}\n")


def test_where_metrics_are_is_said_to_whoever_asks_for_a_tracker(called):
    assert (
        called("grpo", "--report-to", "wandb").err
        == "error: no option --report-to; each step is a line of metrics.jsonl in the run folder\n"
    )


def test_a_command_in_an_error_can_be_pasted_whatever_the_path(s2d, toy, tmp_path):
    problems, rollouts = tmp_path / "my problems.jsonl", tmp_path / "my rollouts.jsonl"
    problems.write_text('{"question": "1 + 1?", "answer": "2"}\n')
    assert s2d("rollout", "-m", toy / "student", problems).err.endswith(f"; make one: s2d prepare '{problems}' -o problems.jsonl\n")
    rollouts.write_bytes(s2d("rollout", "-m", toy / "student", toy / "problems" / "test.jsonl", "-n", 1, "--max-tokens", 1).out)
    assert s2d("eval", "--rollouts", rollouts).err.endswith(f"; grade it first: s2d verify '{rollouts}' -o graded.jsonl\n")


INTERRUPTED_IMPORT = """
import os, signal, sys
class Interrupt:
    def find_spec(self, name, *_):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
sys.argv = ["s2d", "verify"]
from s2dcli.__main__ import main
main()
"""


@pytest.mark.parametrize("module", ["s2dcli.cli", "typer.main", "rich.console", "s2dcli.stages", "s2dcli.stages.verify"])
def test_ctrl_c_while_modules_are_imported_is_one_line(module):
    result = subprocess.run([sys.executable, "-c", INTERRUPTED_IMPORT.format(module=module)], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "error: interrupted\n")


@pytest.mark.parametrize(("number", "code", "how"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")])
def test_a_training_that_is_ended_says_what_is_saved_and_what_resumes_it(toy, tmp_path, number, code, how):
    out, log = tmp_path / "my run", tmp_path / "log"
    command = ["opd", "--teacher", toy / "teacher", "--student", toy / "student", toy / "problems" / "validation.jsonl", "-o", out]
    command += ["--steps", "500", "--problems-per-step", "2", "-n", "2", "--max-tokens", "8", "--save-every", "3"]
    with open(os.devnull) as nothing, log.open("wb") as file:
        pid = start([str(argument) for argument in command], nothing.fileno(), file.fileno(), file.fileno())
    while not (out / "latest").exists():
        time.sleep(0.01)
    os.kill(pid, number)
    assert wait(pid) == code
    saved = int((out / "latest").read_text().removeprefix("step-"))
    begun = read_jsonl(out / "metrics.jsonl")[-1]["step"] + 1
    lost = f"step {begun}" if begun == saved + 1 else f"steps {saved + 1} to {begun}"
    said = f"error: {how}; step {saved} of 500 is saved, the work on {lost} is discarded; resume with "
    assert log.read_text().splitlines()[-1] == said + shlex.join(map(str, ["s2d", *command, "--resume"]))


def test_chatter_never_reaches_standard_output(tmp_path):
    code = (
        "import os, subprocess, sys\n"
        "from s2dcli import console\n"
        "from s2dcli.files import jsonl\n"
        "console.claim_stdout()\n"
        "print('from python'); sys.stdout.flush()\n"
        "os.write(1, b'from C\\n')\n"
        "subprocess.run(['echo', 'from a child'])\n"
        "jsonl.print_result({'a': 1})\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == '{"a": 1}\n'
    assert set(result.stderr.split("\n")) >= {"from python", "from C", "from a child"}


def test_no_traceback_unless_debugging(toy, few, monkeypatch):
    s2d = runner(SimpleNamespace(start=fork))  # a copy of this process, with what is wrong in it
    monkeypatch.setattr("s2dcli.models.checkpoints.resolve", lambda name: 1 / 0)  # what no error class foresees
    arguments = ["rollout", "-m", toy / "student", few]
    plain = s2d(*arguments)
    assert plain.code == 1
    assert "Traceback" not in plain.err
    assert "S2D_DEBUG=1" in plain.err
    monkeypatch.setenv("S2D_DEBUG", "1")
    assert "Traceback" in s2d(*arguments).err


@pytest.mark.parametrize(
    ("given", "needed"),
    [
        (["--eval-every", 5], "--eval-every requires --eval-problems"),
        (["--eval-samples", 5], "--eval-samples requires --eval-problems"),
        (["--min-lr-ratio", 0.1], "--min-lr-ratio requires --schedule linear or cosine"),
    ],
)
@pytest.mark.parametrize("trainer", ["grpo", "opd", "fkl-warmup"])
def test_options_of_a_trainer_that_would_be_ignored_are_refused(s2d, toy, few, trainer, given, needed):
    model = {
        "grpo": ["--model", toy / "student", few],
        "opd": ["--student", toy / "student", "--teacher", toy / "teacher", few],
        "fkl-warmup": ["--student", toy / "student", "--rollouts", few, "--hard-labels"],
    }[trainer]
    result = s2d(trainer, *model, *given)
    assert result.code == 2
    assert needed in result.err


def test_control_characters_never_reach_the_terminal(s2d, toy):
    result = s2d("rollout", "-m", "a\x1b]0;b\x07c", toy / "problems" / "validation.jsonl")
    assert result.code == 2
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", result.err)
    assert "\\x1b" in result.err


def test_quiet_says_nothing_but_the_result(s2d, toy, few):
    result = s2d("eval", "-m", toy / "student", few, "-k", 2, "--max-tokens", 16, "-q")
    assert result.code == 0
    assert result.err == ""
    assert result.result["problems"] == 8


def test_standard_input_from_a_terminal_is_a_usage_error(toy):
    import pty

    controller, terminal = pty.openpty()
    result = subprocess.run(
        [sys.executable, "-m", "s2dcli", "rollout", "-m", str(toy / "student")], stdin=terminal, capture_output=True, text=True, check=False
    )
    os.close(controller)
    os.close(terminal)
    assert result.returncode == 2
    assert "pipe problems into this command or name a file" in result.stderr
