"""Rules and seeds as users name them."""

import json
import re
from pathlib import Path

import pytest

from daemon.settings.rules import read_rule, seed_allocation
from protocol.errors import RuleError, UsageError
from protocol.plans.rule import DEFAULT_RULE, Rule

RULE = Rule.parse("rate - 0.2*depth")


def test_a_rule_is_named_or_written(tmp_path: Path) -> None:
    plain, found = tmp_path / "plain.txt", tmp_path / "rules.json"
    plain.write_text("# where it was found\nrate\n  - 0.2*depth\n")
    found.write_text(json.dumps({"rules": [{"rule": str(RULE), "kl": 0.3}, {"rule": "rate"}]}))
    assert read_rule("default") == DEFAULT_RULE
    for given in (str(plain), str(found), "rate - 0.2*depth", "rate - a*depth with a = 0.2"):
        assert read_rule(given) == RULE
        assert seed_allocation(f"rule:{given}").rule == RULE
    assert seed_allocation("rule").rule == DEFAULT_RULE and seed_allocation("owl").method == "owl"


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("bytes.txt", b"\xff\xfe\x00", "cannot be read: it is not text"),
        ("empty.txt", b"", "needs a number or a name before the end"),
        ("rules.json", b"{}", "holds no rules of a search"),
        ("rules.json", b'{"rules": []}', "holds no rules of a search"),
        ("rules.json", b"[" * 100_000, "holds no rules of a search"),
        ("rules.json", b'{"rules": [{"rule": 7e9}]}', "larger than 1000"),
        ("huge.txt", b"rate + " * 10_000, "at most 1000 characters"),
    ],
)
def test_a_file_without_a_rule_is_refused(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=re.escape(sentence)):
        read_rule(str(tmp_path / name))


def test_what_is_neither_a_file_nor_a_rule_is_called_so(tmp_path: Path) -> None:
    with pytest.raises(RuleError, match=r"there is no rule file 'nowhere\.txt'"):
        read_rule("nowhere.txt")
    with pytest.raises(RuleError, match="'best one' is neither `default` nor a file, and as a rule: "):
        read_rule("best one")
    with pytest.raises(RuleError, match="at most 1000 characters"):
        read_rule("rate + " * 10_000)
    with pytest.raises(UsageError):
        read_rule(str(tmp_path))
