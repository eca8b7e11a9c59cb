"""No secret is recorded or printed, wherever it comes from; what is no secret stays as it is."""

from __future__ import annotations

import json
import logging
import os
import string
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.faulty import start
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from longring.launch import cli
from longring.launch.config import load_recipe
from longring.launch.errors import print_error
from longring.launch.ranks import logs
from longring.launch.ranks.node import RECORDED, environment
from longring.launch.redact import HIDDEN, redact, redact_all
from longring.launch.run_directory import RunDirectory

ERRORS = Path(__file__).parents[2] / "docs" / "errors.md"
# Texts around a secret, which alone say that it is one.
FORMS = (
    *("https://user:{}@host/data", "https://{}@host/data", "s3://key:{}@bucket/data", "hf://u:{}@datasets/o/n@main"),
    *("https://host/a?X-Amz-Signature={}&b=1", "https://host/a?b=1&sig={}", "az://c/a?sv=1;token={}"),
    *(
        "https://host/a?code={}{}{}{}",
        "AWS_SECRET_ACCESS_KEY={}",
        "--password={}",
        "hf_token = '{}'",
        '{{"token": "{}"}}',
    ),
    *("Authorization: Basic {}", "authorization=Bearer {}", "bearer {}", "hf_{}{}{}", "ghp_{}{}{}", "eyJ{}.{}.{}"),
    "-----BEGIN RSA PRIVATE KEY-----\n{}\n-----END RSA PRIVATE KEY-----",
)
secrets = st.text(string.ascii_letters + string.digits, min_size=12, max_size=24)
plain = st.text(string.ascii_letters + " .,:;()'-=\n", max_size=30)


@given(st.sampled_from(FORMS), secrets, plain, plain)
def test_a_secret_is_known_by_its_form(form, secret, before, after):
    assume(secret not in before + form + after)
    said = redact(f"{before} {form.replace('{}', secret).replace('{{', '{').replace('}}', '}')} {after}")
    assert secret not in said
    assert HIDDEN in said
    assert redact(said) == said


@given(st.text(min_size=8, max_size=40).filter(lambda text: "\0" not in text and text.isprintable()), plain, plain)
def test_a_secret_is_known_by_the_environment(secret, before, after):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", secret)
        patch.chdir("/")
        if not Path(secret).exists():
            for shown in (secret, repr(secret), json.dumps(secret)):
                assert secret not in redact(f"{before}\t{shown}\t{after}").replace(HIDDEN, "\0")


def test_what_is_no_secret_stays():
    """Messages of this package, paths and addresses are whole."""
    rows = [line for line in ERRORS.read_text().splitlines() if line.startswith("| ") and "password" not in line]
    assert len(rows) > 60
    for text in (
        *rows,
        *("s3://bucket/a@v1/part-?.jsonl", "hf://datasets/owner/name@main/x.parquet", "http://[::1]:8080/a@b"),
        *("http://host:8080/a@b", "https://host/a.jsonl?download=true&page=2", "simplecache::s3://bucket/a"),
        *("parallel.tokens_per_rank = 512", "data.tokenizer.path=tokens/a.json", "a boundary token: name one"),
        *("must have the form key=value", "/home/me/sk-learn/a", "rank 3: lost the key: value of step 7"),
    ):
        assert redact(text) == text


BOUNDED = """
import resource, sys
from longring.launch.redact import redact
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
redact(sys.stdin.read())
"""


@pytest.mark.parametrize(
    "text",
    [
        *("://a:" * 20_000, "?a=" * 30_000, "token=" * 20_000, "token='" * 20_000, "a-" * 50_000 + "="),
        *("eyJ-" * 30_000, "=a" * 50_000, "authorization: " * 10_000, "-----BEGIN PRIVATE KEY-----" * 5_000),
    ],
    ids=lambda text: text[:8],
)
def test_the_time_is_linear_in_a_hostile_text(text):
    """A server chooses the texts of its errors. A quadratic search would need hours, and has a minute of the CPU."""
    done = subprocess.run([sys.executable, "-c", BOUNDED], input=text * 5, text=True)
    assert done.returncode == 0


def planted(secret: str) -> dict[str, str]:
    """Return variables with a secret in every kind of place."""
    return {
        **{name: f"https://user:{secret}@host/{name}" for name in sorted(RECORDED - {"PYTHONPATH"})[::7]},
        **{"HF_ENDPOINT": f"https://user:{secret}@hub", "HF_HUB_AUTH": secret, "NCCL_SECRET_THING": secret},
        **{
            "LONGRING_ANYTHING": secret,
            "MY_VARIABLE": f"Bearer {secret}",
            "SLURM_JWT": secret,
            "WANDB_API_KEY": secret,
        },
    }


def contents(directory: Path) -> bytes:
    return b"\n".join(file.read_bytes() for file in directory.rglob("*") if file.is_file())


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
# Hypothesis also draws words of the program, which a run's files may hold; none begins with Q7.
@given(secret=secrets.map("Q7{}".format), form=st.sampled_from(FORMS[:10]))
def test_no_file_of_a_run_directory_holds_a_secret(recipe_file, tmp_path, capsys, secret, form):
    text = form.replace("{}", secret)
    run = RunDirectory(tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in planted(secret).items():
            patch.setenv(name, value)
        world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
        for name, value in world.items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", ["train", "recipe.toml", f"data.source.path={text}", secret])
        for key in ("data.directory", "data.source.path", "run_directory", "order.encoder", "slurm.options.comment"):
            with pytest.raises(ValueError, match=rf"{key}.*: (holds a password, a key|not an sbatch)") as error:
                load_recipe(recipe_file, [f'{key}="{text}"'])
            assert secret not in str(error.value)
        run.create(load_recipe(recipe_file))
        run.logs.mkdir(exist_ok=True)
        run.record_start({"environment": environment()})
        run.record_event("lost", 3, f"cannot read {text}")
        handler = logging.FileHandler(run.log_file(0))
        handler.setFormatter(logs.RedactingFormatter(logs.FORMAT))
        try:
            raise OSError(f"cannot open {text}")
        except OSError:
            record = logging.LogRecord("x", logging.ERROR, __file__, 1, "stopped: %s", (text,), sys.exc_info())
        handler.handle(record)
        handler.close()
        print_error(f"cannot open {text}\x1b[2J\nsecond line")
    found = contents(run.path)
    assert len(found) > 500
    assert secret.encode() not in found
    printed = capsys.readouterr().err
    assert secret not in printed
    assert printed.count("\n") == 1 and "\x1b[2J" not in printed


def test_a_name_in_a_recipe_that_records_would_lack_is_refused(recipe_file, monkeypatch):
    """A run continues by the names of sources in its records, so none of them may be taken for a secret."""
    monkeypatch.setenv("AUTHOR", "wikipedia")
    advice = "rename it, or unset the variable"
    for table, rest in (
        ("data.sources", ".kind='text'"),
        ("curriculum.shares", "=0.5"),
        ("curriculum.renewal.graph", "={}"),
    ):
        with pytest.raises(ValueError, match=f"{table}: has a name that holds a password, .*; {advice}") as error:
            load_recipe(recipe_file, [f"{table}.wikipedia{rest}"])
        assert "wikipedia" not in str(error.value)
    load_recipe(recipe_file, ["curriculum.renewal.graph.wiki={}"])
    monkeypatch.delenv("AUTHOR")
    load_recipe(recipe_file, ["curriculum.renewal.graph.wikipedia={}"])


@pytest.mark.full
def test_a_run_that_knows_a_secret_writes_it_nowhere(recipe_file, tmp_path, monkeypatch):
    secret = "Zq83kd02mvPl5x"
    for name in ("HF_ENDPOINT", "HF_HUB_AUTH", "AWS_SECRET_ACCESS_KEY", "MY_VARIABLE", "CUDA_HOME"):
        monkeypatch.setenv(name, planted(secret).get(name, f"https://user:{secret}@host"))
    output = tmp_path / "output.txt"
    run = tmp_path / "run [/x]"  # it must not be read as markup
    for steps in (1, 2):  # a second start reads what the first has written
        settings = ["train.steps=2", "train.warmup_steps=0", f"run_directory={run}"]
        assert start(1, recipe_file, settings, output, stop_after=steps).wait() == [0], output.read_text()
    found = contents(run)
    assert b"CUDA_HOME" in found and secret.encode() not in found
    assert secret not in output.read_text()


def test_only_listed_variables_are_recorded(monkeypatch):
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    for name in ("NCCL_DEBUG_NEW", "HF_ENDPOINT", "HF_HUB_AUTH", "LONGRING_ANYTHING", "HOME"):
        monkeypatch.setenv(name, "hush")
    found = environment()
    assert found["variables"]["NCCL_DEBUG"] == "WARN"
    assert set(found["variables"]) <= RECORDED
    assert "hush" not in str(found)


def test_nested_values_keep_their_shape():
    assert redact_all({"a": [1, None, "token=abc"], "b": (2.5, "x")}) == {
        "a": [1, None, f"token={HIDDEN}"],
        "b": [2.5, "x"],
    }


def test_a_short_value_or_a_path_is_no_secret(monkeypatch, tmp_path):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path))
    assert redact(f"{tmp_path} is false") == f"{tmp_path} is false"


SERVER = """
import http.server, sys
class Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self):
        if self.headers.get("Authorization") != "Bearer letmein12345":
            return self.send_error(401)
        super().do_GET()
    do_HEAD = do_GET
    def log_message(self, *_): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


@pytest.mark.full
def test_the_advice_to_use_the_environment_works(recipe_file, tmp_path, capsys):
    """A source behind a bearer token: refused in the recipe, read with FSSPEC_HTTP, as docs/security.md shows."""
    (tmp_path / "documents.jsonl").write_text((recipe_file.parent / "documents.jsonl").read_text())
    server = subprocess.Popen([sys.executable, "-c", SERVER], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        address = f"http://127.0.0.1:{int(server.stdout.readline())}/documents.jsonl"
        directory = f"data.directory={tmp_path}/data"
        words = ["prepare", str(recipe_file), directory, "--workers", "1"]
        assert cli.main([*words, f"data.source.path={address}?token=letmein12345"]) == 2
        assert "put it in the environment instead, as docs/security.md shows" in " ".join(
            capsys.readouterr().err.split()
        )
        options = json.dumps({"client_kwargs": {"headers": {"Authorization": "Bearer letmein12345"}}})
        command = [sys.executable, "-m", "longring.launch.cli", *words, f"data.source.path={address}"]
        tried = [
            subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
            for variables in ({}, {"FSSPEC_HTTP": options})
        ]
        assert [done.returncode for done in tried] == [2, 0], tried
        assert b"letmein12345" not in contents(tmp_path / "data")
    finally:
        server.kill()
        server.wait()
