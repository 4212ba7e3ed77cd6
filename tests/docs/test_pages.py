"""The user's guide: every page is in the nav, every link leads somewhere, every YAML block is a configuration."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from dmdr_fast import cli

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
NAMES = [str(page.relative_to(DOCS)) for page in PAGES]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.S | re.M)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
TAG = re.compile(r'<img[^>]*\bsrc="([^"]+)"')
KEYS = {path for path, _ in cli.leaves()}
GROUPS = {path.rpartition(".")[0] for path in KEYS} - {""}


def nav(entries):
    """The files of a nav, in order."""
    for entry in entries:
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            yield from nav(value) if isinstance(value, list) else [value]


def anchors(page):
    """The fragments that a page's headings get: lower case, words joined by dashes."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.M)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def merged(base, over):
    """``over`` on top of ``base``, group by group."""
    if isinstance(base, dict) and isinstance(over, dict):
        return base | {key: merged(base.get(key), value) for key, value in over.items()}
    return over


def test_every_page_is_in_the_nav_once():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert config["docs_dir"] == "docs"
    assert sorted(nav(config["nav"])) == sorted(NAMES)


def test_the_first_page_leads_to_every_other():
    assert set(NAMES) - {"index.md"} <= set(LINK.findall((DOCS / "index.md").read_text()))


@pytest.mark.parametrize("name", NAMES)
def test_every_link_leads_somewhere(name):
    page = DOCS / name
    text = FENCE.sub("", page.read_text())
    for target in LINK.findall(text) + TAG.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, fragment = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file(), f"{name}: {target}"
        assert DOCS in file.parents, f"{name}: {target} is not in docs/"
        assert not fragment or fragment in anchors(file), f"{name}: {target}: {sorted(anchors(file))}"


@pytest.mark.parametrize("name", NAMES)
def test_every_yaml_block_is_a_configuration(name, tmp_path):
    """On top of the embedded default, as a user would put it into a file of theirs."""
    base = yaml.load(cli.DEFAULT_CONFIG.read_text(), Loader=cli._Loader)
    for language, block in FENCE.findall((DOCS / name).read_text()):
        if language == "yaml":
            file = tmp_path / "config.yaml"
            file.write_text(yaml.safe_dump(merged(base, yaml.load(block, Loader=cli._Loader))))
            cli.load(file)


@pytest.mark.parametrize("name", NAMES)
def test_every_key_that_a_page_names_exists(name):
    """`section.key` and `section.key: value` in the text, where the section is one of the configuration's."""
    text = FENCE.sub("", (DOCS / name).read_text())
    for key in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?:: [^`]*)?`", text):
        if key.partition(".")[0] in {group.partition(".")[0] for group in GROUPS} and not key.endswith((".py", ".md")):
            assert key in KEYS | GROUPS, f"{name}: {key}"
