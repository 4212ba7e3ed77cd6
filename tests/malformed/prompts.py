"""Files of prompts: what is read is a prompt that a tokenizer takes, or the file is refused; it is never changed."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pyarrow
import pyarrow.parquet
from hypothesis import strategies as st

from dmdr_fast.data.prompts import load_prompts

from . import Case, contents, drawn
from .runs import flipped

HALF = '{"prompt": "a cat \\ud83d"}\n'
CAT = "\U0001f408"


def parquet(**columns: list) -> bytes:
    written = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), written)
    return written.getvalue()


REFUSED: dict[str, tuple[str, bytes]] = {
    "empty": ("p.txt", b""),
    "blank": ("p.txt", b" \n\t\r\n\n"),
    "a mark alone": ("p.txt", b"\xef\xbb\xbf"),
    "widthless characters alone": ("p.txt", "\u200b\n\u2060\u200d\n\ufeff".encode()),
    "Latin-1": ("p.txt", "größer".encode("latin-1")),
    "UTF-8 cut": ("p.txt", "größ".encode()[:-1]),
    "UTF-16 without a mark": ("p.txt", "sea".encode("utf-16-le")),
    "UTF-16 cut": ("p.txt", "sea".encode("utf-16")[:-1]),
    "half of a pair in UTF-16": ("p.txt", b"\xff\xfe\x3d\xd8a\0"),
    "UTF-32 beyond Unicode": ("p.txt", b"\xff\xfe\0\0\xff\xff\xff\xff"),
    "a zero byte": ("p.txt", b"sea\na\0b\n"),
    "an image": ("p.txt", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"),
    "another ending": ("p.docx", b"sea"),
    "no ending": ("prompts", b"sea"),
    "a half character": ("p.jsonl", HALF.encode()),
    "a half character as bytes": ("p.jsonl", b'{"prompt": "\xed\xa0\xbd"}'),
    "a zero byte in JSON": ("p.jsonl", b'{"prompt": "a\\u0000b"}'),
    "widthless characters in JSON": ("p.jsonl", b'{"prompt": "\\u200b\\ufeff"}'),
    "no key": ("p.jsonl", b'{"caption": "sea"}'),
    "a number": ("p.jsonl", b'{"prompt": 3}'),
    "null": ("p.jsonl", b'{"prompt": null}'),
    "a list for a prompt": ("p.jsonl", b'{"prompt": ["sea"]}'),
    "a list for a line": ("p.jsonl", b'["sea"]'),
    "a word for a line": ("p.jsonl", b"sea"),
    "two objects in a line": ("p.jsonl", b'{"prompt": "sea"} {"prompt": "sea"}'),
    "an object over two lines": ("p.jsonl", b'{"prompt":\n"sea"}'),
    "a deep line": ("p.jsonl", b"[" * 100_000),
    "a long number": ("p.jsonl", b"1" * 10_000),
    "a list with a list": ("p.json", b'["sea", ["sea"]]'),
    "an empty list": ("p.json", b"[]"),
    "an object": ("p.json", b'{"prompt": ["sea"]}'),
    "JSON Lines": ("p.json", b'{"prompt": "sea"}\n{"prompt": "sea"}\n'),
    "JSON cut": ("p.json", b'["sea", "a'),
    "a half character in a list": ("p.json", b'["\\ud83d"]'),
    "no JSON": ("p.json", b"\0\0"),
    "semicolons": ("p.csv", b"id;prompt\n1;sea\n"),
    "no header": ("p.csv", b"sea\na red cat\n"),
    "a header alone": ("p.csv", b"id,prompt\n"),
    "two columns of the name": ("p.csv", b"prompt,prompt\nsea,sea\n"),
    "an open quote": ("p.csv", b'prompt\n"sea\na red cat\n'),
    "a quote in a quote": ("p.csv", b'prompt\n"sea"s\n'),
    "a short row": ("p.csv", b"id,prompt\n1\n"),
    "an empty cell": ("p.csv", b"id,prompt\n1,\n"),
    "a cell too large": ("p.csv", b'prompt\n"' + b"a" * 200_000 + b'"\n'),
    "a zero byte in a cell": ("p.csv", b"prompt\na\0b\n"),
    "another column": ("p.parquet", parquet(caption=["sea"])),
    "no rows": ("p.parquet", parquet(prompt=pyarrow.array([], pyarrow.string()))),
    "numbers": ("p.parquet", parquet(prompt=[1, 2])),
    "a row of null": ("p.parquet", parquet(prompt=["sea", None])),
    "bytes": ("p.parquet", parquet(prompt=[b"sea"])),
    "lists": ("p.parquet", parquet(prompt=[["sea"]])),
    "a text": ("p.parquet", b"sea\n"),
    "empty Parquet": ("p.parquet", b""),
    "Parquet cut": ("p.parquet", parquet(prompt=["sea"])[:-7]),
    "marks of Parquet alone": ("p.parquet", b"PAR1" * 4),
}
RIGHT: dict[str, tuple[str, bytes, list[str]]] = {
    "a mark": ("p.txt", b"\xef\xbb\xbfa red cat\r\nsea\r\n", ["a red cat", "sea"]),
    "UTF-16": ("p.txt", f"sea\n{CAT}".encode("utf-16"), ["sea", CAT]),
    "UTF-32": ("p.txt", f"sea\n{CAT}".encode("utf-32"), ["sea", CAT]),
    "ends of an old Macintosh": ("p.txt", b"sea\ra red cat\r", ["sea", "a red cat"]),
    "no end": ("p.txt", b"sea", ["sea"]),
    "spaces of all kinds": ("p.txt", "\u00a0sea\u3000\n\u200b\n".encode(), ["sea"]),
    "joiners inside": ("p.txt", "a\u200db".encode(), ["a\u200db"]),
    "marks in the middle": ("p.txt", b"sea\n\xef\xbb\xbfa red cat", ["sea", "a red cat"]),
    "long": ("p.txt", b"a" * 10**6, ["a" * 10**6]),
    "a pair": ("p.jsonl", b'\xef\xbb\xbf{"prompt": "\\ud83d\\udc08"}\n', [CAT]),
    "keys twice": ("p.jsonl", b'{"prompt": "a", "prompt": "sea"}', ["sea"]),
    "texts": ("p.json", json.dumps(["sea", CAT]).encode(), ["sea", CAT]),
    "texts and objects": ("p.json", b'["sea", {"prompt": "a red cat"}]', ["sea", "a red cat"]),
    "quotes": ("p.csv", b'id,prompt\r\n1,"a, ""b"""\r\n\r\n2,"a\r\nb"\r\n', ['a, "b"', "a\nb"]),
    "a mark in a table": ("p.csv", b"\xef\xbb\xbfprompt\nsea\n", ["sea"]),
    "a longer row": ("p.csv", b"prompt\nsea,more\n", ["sea"]),
    "a table": ("p.parquet", parquet(prompt=["sea", CAT]), ["sea", CAT]),
    "large texts": ("p.parquet", parquet(prompt=pyarrow.array(["sea"], pyarrow.large_string())), ["sea"]),
    "a dictionary": ("p.parquet", parquet(prompt=pyarrow.array(["sea"]).dictionary_encode()), ["sea"]),
}
TEXTS = st.text(max_size=12) | st.sampled_from(["prompt", '"', ",", "\\ud83d", "\r\n", "\ufeff", "\u200b", "{", "]"])
ROWS = st.lists(
    st.recursive(st.none() | st.integers() | st.text(max_size=8), lambda inner: st.lists(inner), max_leaves=3)
)
FILES = st.tuples(
    st.sampled_from(["p.txt", "p.jsonl", "p.json", "p.csv", "p.parquet"]),
    st.binary(max_size=60)
    | st.lists(TEXTS, max_size=8).map(lambda parts: "".join(parts).encode("utf-8", "surrogatepass"))
    | ROWS.map(lambda rows: json.dumps(rows).encode())
    | ROWS.map(lambda rows: "\n".join(json.dumps({"prompt": row}) for row in rows).encode()),
)


def start(name: str, content: bytes, folder: Path, *, expected: list[str] | None = None) -> None:
    (folder / name).write_bytes(content)
    before = contents(folder)
    try:
        prompts = load_prompts(folder / name)
    finally:
        assert contents(folder) == before
    texts = [prompt.text for prompt in prompts]
    assert expected is None or texts == expected, texts[:5]
    assert texts and all(text.strip() == text != "" and "\0" not in text and text.encode() for text in texts)
    assert len({prompt.place for prompt in prompts}) == len(prompts)


def folder_of(files: dict[str, bytes], folder: Path) -> None:
    for name, content in files.items():
        (folder / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "set" / name).write_bytes(content)
    assert [p.text for p in load_prompts(folder / "set")] == ["sea", "a red cat"]


def cases(count: int) -> Iterator[Case]:
    for name, (file, content) in REFUSED.items():
        yield Case(f"{file}: {name}", partial(start, file, content))
    for name, (file, content, expected) in RIGHT.items():
        yield Case(f"{file}: {name}", partial(start, file, content, expected=expected), "accepted")
    whole = {"b.parquet": parquet(prompt=["a red cat"]), "a/x.parquet": parquet(prompt=["sea"])}
    yield Case("a folder", partial(folder_of, whole | {"README.md": b"no"}), "accepted")
    yield Case("a folder with a torn file", partial(folder_of, whole | {"c.parquet": b"PAR1"}))
    yield Case("a folder of texts", partial(folder_of, {"a.txt": b"sea\na red cat"}))
    for name in ("missing.txt", "a" * 5000, "a\0b"):
        yield Case(f"{name[:20]!r}", lambda folder, name=name: load_prompts(folder / name))
    for file, content in drawn(FILES, count):
        yield Case(f"{file}: {content!r}", partial(start, file, content), "either")
    for seed in range(count // 4):
        turned = flipped(parquet(prompt=["a red cat", "sea"] * 50), random.Random(seed))
        yield Case(f"p.parquet: bytes turned by {seed}", partial(start, "p.parquet", turned), "either")
