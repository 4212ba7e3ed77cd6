"""Prompt files of every kind, and what is said about wrong ones."""

import json

import pytest

from dmdr_fast.data import prompts as module
from dmdr_fast.data.prompts import is_prompt_file
from dmdr_fast.errors import UserError

PROMPTS = ["a red cat", "Straße, 猫", "a red cat"]
SCOTLAND = "\U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f"


def load_prompts(path, key="prompt"):
    return [prompt.text for prompt in module.load_prompts(path, key)]


def places(path, key="prompt"):
    return [prompt.place for prompt in module.load_prompts(path, key)]


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


def test_csv(tmp_path):
    file = tmp_path / "p.csv"
    file.write_text(
        '\ufeffid,prompt\r\n1,a red cat\r\n\r\n2,"Straße, 猫"\r\n3,"a\nred ""cat"""\r\n4,sea', encoding="utf-8"
    )
    assert load_prompts(file) == ["a red cat", "Straße, 猫", 'a\nred "cat"', "sea"]
    assert places(file) == ["line 2", "line 4", "line 5", "line 7"]


def test_json(tmp_path):
    file = tmp_path / "p.json"
    file.write_text(json.dumps([PROMPTS[0], {"prompt": PROMPTS[1], "id": 3}, f" {PROMPTS[2]}\n"]))
    assert load_prompts(file) == PROMPTS and places(file) == ["item 1", "item 2", "item 3"]


def test_a_folder_of_parquet_files(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    for name, part in (("train-00001", PROMPTS[2:]), ("train-00000", PROMPTS[:2])):
        (tmp_path / "data").mkdir(exist_ok=True)
        parquet.write_table(pyarrow.table({"prompt": part}), tmp_path / "data" / f"{name}.parquet")
    (tmp_path / "README.md").write_text("a data set")
    assert load_prompts(tmp_path) == PROMPTS
    assert places(tmp_path)[-1] == "data/train-00001.parquet, row 1"
    (tmp_path / "data/train-00002.parquet").write_bytes(b"no")
    with pytest.raises(UserError, match=r"train-00002\.parquet: not readable as Parquet"):
        load_prompts(tmp_path)
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match=r"a folder without \.parquet files"):
        load_prompts(tmp_path / "other")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "utf-16-be"])
@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
def test_byte_order_marks_and_line_ends(tmp_path, encoding, ends):
    mark = "\ufeff" if encoding.endswith("-be") else ""
    (tmp_path / "p.txt").write_bytes((mark + ends.join([*PROMPTS, ""])).encode(encoding))
    assert load_prompts(tmp_path / "p.txt") == PROMPTS
    lines = ends.join(json.dumps({"prompt": p}, ensure_ascii=False) for p in PROMPTS)
    (tmp_path / "p.jsonl").write_bytes((mark + lines).encode(encoding))
    assert load_prompts(tmp_path / "p.jsonl") == PROMPTS


def test_what_has_no_width_is_no_prompt(tmp_path):
    file = tmp_path / "p.txt"
    file.write_text(
        f"\u00a0 a red cat\u00a0 \n\u200b\n \u2060\u200d\ufeff\n\ufeffsea\n\u200e{SCOTLAND}\n", encoding="utf-8"
    )
    assert load_prompts(file) == ["a red cat", "sea", SCOTLAND]
    assert places(file) == ["line 1", "line 4", "line 5"]


def test_a_word_of_the_command_line(tmp_path):
    (tmp_path / "prompts").write_text("sea")
    assert is_prompt_file(str(tmp_path / "prompts")) and is_prompt_file("missing.csv")
    assert not any(map(is_prompt_file, ("a red cat", "x" * 5000, "a\0b", str(tmp_path))))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.xlsx", b"a", r"got \.xlsx; give a \.txt, \.jsonl, \.json, \.csv, \.parquet file, or a folder"),
        ("p.txt", b"sea\na\0b\n", "line 2 expected a text, got one with a zero byte"),
        ("p.txt", "sea".encode("utf-16-le"), "line 1 expected a text, got one with a zero byte"),
        ("p.txt", b"\xff\xfes", "not UTF-16 text .* at byte"),
        (
            "p.jsonl",
            b'{"prompt": "a cat \\ud83d"}\n',
            r"line 1 expected a text in 'prompt', got one with half of .*ud83d",
        ),
        ("p.jsonl", b'{"prompt": "\\u200b"}\n', "line 1 expected a text in 'prompt', got an empty one"),
        ("p.json", b'{"prompt": ["a"]}', "expected a list of texts or objects, got dict"),
        ("p.json", b'["a", 3]', "item 2 expected a text in 'prompt', got int"),
        ("p.json", b'["a", {"text": "b"}]', "item 2 has no key 'prompt'; it has 'text'"),
        ("p.json", b"[" * 100_000, "it is no JSON"),
        ("p.csv", b"id;prompt\n1;a\n", "no column 'prompt'; its first line has 'id;prompt'"),
        ("p.csv", b"prompt,prompt\na,b\n", "2 columns 'prompt'"),
        ("p.csv", b"id,prompt\n1\n", "line 2 expected a text in 'prompt', got nothing"),
        ("p.csv", b'id,prompt\n1,a\n2,"b\n3,c\n', "line 3 is no row of a table .*; correct its quotes"),
        ("p.csv", b"", "no column 'prompt'; its first line has none"),
        ("p.csv", b"prompt\n", "no prompt in it"),
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
