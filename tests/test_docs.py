"""The documents agree with the code and with each other's names."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from afd_server.config import ENV_PREFIX, ServeConfig

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\(([^()\s]+)\)")
CODE_BLOCK = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def settings_table() -> dict[str, list[str]]:
    """Return the cells of each row of docs/configuration.md, by YAML key."""
    lines = (ROOT / "docs" / "configuration.md").read_text("utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    return {row[2].strip("`"): row for row in rows if len(row) == 5 and row[2].startswith("`")}


@pytest.mark.parametrize("setting", fields(ServeConfig), ids=lambda setting: setting.name)
def test_every_setting_is_documented_with_its_names_and_default(setting):
    flag, variable, _, default, meaning = settings_table()[setting.name]
    flags = {"model": "`MODEL` (positional)"}
    assert flag == flags.get(setting.name, f"`--{setting.name.replace('_', '-')}`")
    assert variable == f"`{ENV_PREFIX}{setting.name.upper()}`"
    assert default == ("none" if setting.default is None else f"`{setting.default}`")
    assert meaning


def test_no_setting_is_documented_that_does_not_exist():
    assert list(settings_table()) == [setting.name for setting in fields(ServeConfig)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(document):
    text = CODE_BLOCK.sub("", document.read_text("utf-8"))
    targets = [link.partition("#")[0] for link in LINK.findall(text) if "://" not in link]
    missing = [target for target in targets if not (document.parent / target).exists()]
    assert not missing, f"{document.relative_to(ROOT)} links to {missing}"
