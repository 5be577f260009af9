"""The tokenizer's data ships with us: tiktoken must find it complete, and never reach for it."""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

DATA = Path(__file__).parents[2] / "config/data/tiktoken"
URL = "https://openaipublic.blob.core.windows.net/encodings/o200k_base.tiktoken"
SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
# tiktoken's cache names a file by the SHA-1 of its address.
FILE = DATA / hashlib.sha1(URL.encode(), usedforsecurity=False).hexdigest()

TEXTS = ["hello world", " Grüße, 你好, 🚍", "def f(x):\n\treturn x // 2\n", ""]
# The child refuses every socket, so that only the file can have answered.
CHILD = """
import json, socket, sys

def refuse(*_args, **_kwargs):
    raise OSError("the tokenizer reached for the network")

socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
import tiktoken

encoding = tiktoken.get_encoding("o200k_base")
tokens = [encoding.encode(text) for text in json.loads(sys.argv[1])]
print(json.dumps([tokens, [encoding.decode(some) for some in tokens]]))
"""


def run_child(cache: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(TEXTS)],
        env={**os.environ, "TIKTOKEN_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_file_is_the_one_that_tiktoken_pins() -> None:
    spec = importlib.util.find_spec("tiktoken_ext.openai_public")
    assert spec
    assert spec.origin
    pinned = Path(spec.origin).read_text("utf-8").partition("def o200k_base")[2]

    assert URL in pinned
    assert SHA256 in pinned
    assert hashlib.sha256(FILE.read_bytes()).hexdigest() == SHA256


def test_the_folder_holds_nothing_else() -> None:
    assert {file.name for file in DATA.iterdir()} == {FILE.name, "README.md"}


def test_text_survives_encoding_without_network() -> None:
    child = run_child(DATA)

    assert child.returncode == 0, child.stderr
    tokens, texts = json.loads(child.stdout)
    assert texts == TEXTS
    assert tokens[0] == [24912, 2375]
    assert tokens[3] == []


def test_without_the_file_tiktoken_would_reach_for_the_network(tmp_path: Path) -> None:
    child = run_child(tmp_path)

    assert child.returncode != 0
    assert "Error" in child.stderr
