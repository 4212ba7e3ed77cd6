"""Prompt files of every kind, and what is said about wrong ones."""

import json

import pytest

from dmdr_fast.data.prompts import load_prompts
from dmdr_fast.errors import UserError

PROMPTS = ["a red cat", "Straße, 猫", "a red cat"]


def test_a_text_file(tmp_path):
    file = tmp_path / "p.txt"
    file.write_bytes("a red cat\r\n\n  Straße, 猫 \na red cat".encode())
    assert load_prompts(file) == PROMPTS


def test_json_lines(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(json.dumps({"id": i, "caption": p}) for i, p in enumerate(PROMPTS)) + "\n\n")
    assert load_prompts(file, key="caption") == PROMPTS


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    file = tmp_path / "p.parquet"
    parquet.write_table(pyarrow.table({"id": [1, 2, 3], "prompt": PROMPTS}), file)
    assert load_prompts(file) == PROMPTS
    with pytest.raises(UserError, match="no column 'text'; it has 'id', 'prompt'"):
        load_prompts(file, key="text")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match="not readable as Parquet"):
        load_prompts(file)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", b"a", r"expected a file ending in \.txt, \.jsonl, \.parquet, got \.csv"),
        ("p.txt", b"\n \n", "no prompt in it"),
        ("p.txt", b"caf\xe9\n", "not UTF-8 text .* at byte 3"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "line 2 is no JSON"),
        ("p.jsonl", b'{"prompt": "a"}\n\n{"text": "b"}\n', "line 3 has no key 'prompt'; it has 'text'"),
        ("p.jsonl", b'["a"]\n', "line 1 expected an object, got list"),
        ("p.jsonl", b'{"prompt": 3}\n', "line 1 expected a text in 'prompt', got int"),
        ("p.jsonl", b'{"prompt": " "}\n', "line 1 expected a text in 'prompt', got an empty one"),
    ],
)
def test_wrong_files(tmp_path, name, content, message):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_prompts(file)


def test_no_file(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_prompts(tmp_path / "p.txt")
