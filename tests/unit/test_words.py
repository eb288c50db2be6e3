"""Phrases that the project does not use. scripts/check has the single words: scripts/words.txt."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("bench", "demo", "docker", "docs", "flows", "k2flow", "kubernetes", "scripts", "tests", "torture")
SUFFIXES = {"", ".css", ".html", ".json", ".md", ".py", ".sh", ".svg", ".yaml", ".yml"}
COMMENT = re.compile(r"\n[ \t]*(?:#+:? |\| )?[ \t]*")
"""A line break inside a sentence, with the comment sign of the next line."""
BETTER = {
    r"as ever": "as before",
    r"as it must be": "up to date",
    r"at the most": "at most",
    r"by now": "already",
    r"came of (?:it|them|that)": "the results",
    r"come of (?:it|them|that)": "the results",
    r"comes of (?:it|them|that)": "the results",
    r"(?:do|does|done|doing|did) (?:it |them |this |that )?over": "reprocess",
    r"for ever": "forever",
    r"go(?:es|ing)? on(?! (?:the|a|its|each|one)\b)": "continue",
    r"judge(?:s|d)? again": "validate again, reprocess",
    r"(?:that|which|who) nothing reaches": "orphan files",
    r"of which": "split the sentence",
    r"so many": "N, that many",
    r"step(?:s|ped)? back": "yield",
    r"the law (?:holds|is broken)": "all invariants hold, an invariant is violated",
    r"what (?:came|comes|became|becomes|will come) of": "the results of",
    r"where (?:its|their) ledger ends": "at the next offset of its ledger",
}
PHRASES = {re.compile(rf"\b{phrase}\b".replace(" ", " +"), re.IGNORECASE): better for phrase, better in BETTER.items()}


def texts() -> list[Path]:
    """Return the files that people read: source, tests, scripts and documents."""
    found = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*")) if path.is_file()]
    found = [path for path in found if path.suffix in SUFFIXES and not {"secrets", "__pycache__"} & set(path.parts)]
    return [*sorted(ROOT.glob("*.md")), *(path for path in found if path != Path(__file__))]


def unwanted(text: str) -> list[tuple[int, str]]:
    """Return the line and the advice for each phrase found in `text`, also across line breaks and in names."""
    flat = COMMENT.sub(lambda line: " " * len(line[0]), text.replace("_", " "))
    return sorted(
        (text.count("\n", 0, match.start()) + 1, f"{' '.join(match[0].split())!r}: better {better!r}")
        for phrase, better in PHRASES.items()
        for match in phrase.finditer(flat)
    )


@pytest.mark.parametrize("path", texts(), ids=lambda path: str(path.relative_to(ROOT)))
def test_text_has_no_unwanted_phrase(path: Path) -> None:
    found = unwanted(path.read_text("utf-8"))
    assert not found, "\n".join(f"{path.relative_to(ROOT)}:{line}: {advice}" for line, advice in found)


@pytest.mark.parametrize(
    "text",
    [
        "ten at\n    # the most",
        "keeps it for\never",
        "test_so_many_rows",
        "Goes on without it",
        "rows are judged again",
    ],
)
def test_phrases_are_found_across_lines_and_in_names(text: str) -> None:
    assert unwanted(text)


@pytest.mark.parametrize("text", ["for every table", "go on the list", "at most ten", "forever", "as many rows"])
def test_good_sentences_pass(text: str) -> None:
    assert not unwanted(text)
