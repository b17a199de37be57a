"""Words that the code no longer uses; `python -m tests.test_language` prints what is still open, for `OPEN`."""

import ast
import re
from collections import Counter, defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "shadowtune"
DIRECTORIES = (PACKAGE, ROOT / "benchmarks", ROOT / "examples")

NAMES = {  # part(s) of a name of ours -> the term
    "storey": "layer, package",
    "house": "layer, package",
    "verb": "subcommand",
    "fault": "error",
    "faults": "errors",
    "way_out": "hint",
    "place": "position, index, location or path",
    "places": "positions, indices, locations or paths",
    "said": "generated, emitted",
    "told": "reported",
    "spoken": "decoded",
    "speaks": "decodes",
    "looked_at": "polled",
    "seen_off": "closed",
    "stands": "accepted",
    "crossing": "boundary",
    "crossings": "boundaries",
    "arrive": "finalize",
    "slow_truth": "reference",
    "few_rows": "prepacked linear",
    "vocabulary_sweep": "fused linear cross-entropy",
    "labelled_rows": "shift_and_select",
    "mixture": "batched adapters, multi-adapter boundaries",
    "draft_fusion": "draft head",
    "feedback": "draft head",
    "head_mixing": "logit interpolation",
    "vote": "logit interpolation",
    "peer": "baseline, third-party format",
    "peers": "baselines, third-party formats",
    "contender": "baseline",
    "contenders": "baselines",
    "subject": "candidate",
    "subjects": "candidates",
    "outlook": "projection, extrapolation",
    "obstacle": "unsupported feature",
    "obstacles": "unsupported features",
    "verdict": "result",
    "verdicts": "results",
    "carve": "split",
    "carving": "splitting",
    "held_back": "hold-out",
    "alone": "shadow-only",
    "together": "joint",
    "shadow_first": "shadow-only stage",
    "taught": "teacher logits",
    "intake": "request processor",
    "owed": "next chunk",
    "desk": "admission controller",
    "dialect": "protocol",
    "dialects": "protocols",
    "wording": "detokenizer",
    "answerer": "backend",
    "answerers": "backends",
    "piece": "output chunk",
    "pieces": "output chunks",
    "pump": "async stream",
    "wire": "codec",
    "hand_over": "deferral",
    "far": "remote",
    "journey": "request trace",
    "luck": "rng",
    "home": "return latency",
    "open_model": "LoadedModel",
    "labelled_set": "evaluation set",
    "served": "loaded adapters",
    "open_trained": "load run",
    "recording": "record answers",
    "quiet_imports": "warning filters",
    "standard_error": "resilient stderr",
}
TECHNICAL = {"so_far"}  # names, or parts of names, in which one of these words is plain English

ONLY_IN = {  # words that are plain or technical English elsewhere, "piece" of a tokenizer's for instance
    "piece": ("src/shadowtune/serving", "src/shadowtune/cli"),
    "pieces": ("src/shadowtune/serving", "src/shadowtune/cli"),
    "alone": ("src/shadowtune/training", "src/shadowtune/config"),
    "together": ("src/shadowtune/training", "src/shadowtune/config"),
    "held back": ("src/shadowtune/data", "src/shadowtune/config", "src/shadowtune/comparison"),
}

PROSE = {  # pattern in docstrings -> the term; plain English is left alone
    r"storeys?": "layer, package",
    r"verbs?": "subcommand",
    r"faults?(?<!at fault)": "error",
    r"ways? out": "hint",
    r"(?<!in )(?<!in the )(?<!takes )(?<!take )places?": "position, index, location or path",
    r"told": "reported",
    r"speaks": "decodes",
    r"seen off": "closed",
    r"crossings?": "boundary",
    r"(?:the )?slow truth": "reference implementation",
    r"few rows": "prepacked linear",
    r"vocabulary sweep": "fused linear cross-entropy",
    r"mixtures? of boundaries": "multi-adapter boundaries",
    r"draft fusion": "draft head",
    r"head mixing": "logit interpolation",
    r"votes?": "logit interpolation",
    r"peers?": "baseline, third-party format",
    r"contenders?": "baseline",
    r"outlooks?": "projection, extrapolation",
    r"obstacles?": "unsupported feature",
    r"verdicts?": "result",
    r"carv(?:e|es|ed|ing)": "split",
    r"held back": "held out",
    r"taught": "teacher logits",
    r"intake": "request processor",
    r"owed": "next chunk",
    r"desks?": "admission controller",
    r"dialects?": "protocol",
    r"answerers?": "backend",
    r"pumps?": "async stream",
    r"hand(?:s|ed|ing)? over": "defer to the cloud",
    r"far (?:server|side|end)s?": "remote endpoint",
    r"worlds?(?! size)": "simulator",
    r"journeys?": "request trace",
    r"luck": "rng",
    r"doors?": "interface",
}
ROWS = ("src/shadowtune/core", "src/shadowtune/attach", "src/shadowtune/serving", "src/shadowtune/model/speculation")
"""Where a docstring's "row" of a batch is a sequence; elsewhere rows are a file's, a table's or a matrix's."""
BATCH_ROWS = re.compile(
    r"\brows? (?:of|in) (?:a|the) batch\b|\brows? (?:that|which) (?:is|are) decoded\b", re.IGNORECASE
)

# OPEN-BEGIN
OPEN: dict[str, set[str]] = {}
REPEATED: set[str] = set()
UNDOCUMENTED: set[str] = set()
# OPEN-END


def _modules():
    for directory in DIRECTORIES:
        for path in sorted(directory.rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def _parts(name):
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower().strip("_")


def _defined(node):
    """Yield the names that a node defines; a name that is only used may be another library's."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield node.name
    elif isinstance(node, ast.arg):
        yield node.arg
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        yield node.attr
    elif isinstance(node, ast.alias) and node.asname:
        yield node.asname


def _applies(word, file):
    return file.startswith(ONLY_IN.get(word, ""))


def words_in_name(name, file=""):
    """Return the words of `NAMES` that a name in a file holds."""
    padded = f"_{_parts(name)}_"
    for technical in TECHNICAL:
        padded = padded.replace(f"_{technical}_", "_")
    return {word for word in NAMES if f"_{word}_" in padded and _applies(word, file)}


def words_in_prose(text, file):
    """Return the words that a docstring holds, as they are spelt there."""
    text = " ".join(text.split())
    spelt = (m.group().lower() for pattern in PROSE for m in re.finditer(rf"\b{pattern}\b", text, re.IGNORECASE))
    found = {word for word in spelt if _applies(word, file)}
    if file.startswith(ROWS):
        found |= {match.group().lower() for match in BATCH_ROWS.finditer(text)}
    return found


def found_words():
    """Return the files of every such word: "name: WORD" of identifiers, "prose: WORD" of docstrings."""
    found = defaultdict(set)
    for file, tree in _modules():
        names = {part for part in Path(file).with_suffix("").parts[-2:] if part != "__init__"}
        texts = []
        for node in ast.walk(tree):
            names.update(_defined(node))
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                texts.append(ast.get_docstring(node) or "")
        for name in names:
            for word in words_in_name(name, file):
                found[f"name: {word}"].add(file)
        for text in texts:
            for word in words_in_prose(text, file):
                found[f"prose: {word}"].add(file)
    return dict(found)


def repeated_classes():
    """Return the class names that more than one class of the package has."""
    counts = Counter(
        node.name
        for file, tree in _modules()
        if file.startswith("src/")
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    )
    return {name for name, count in counts.items() if count > 1}


def undocumented_modules():
    """Return the files whose module docstring is missing or begins with the number of a layer."""
    return {
        file for file, tree in _modules() if not (text := ast.get_docstring(tree)) or text.lower().startswith("storey")
    }


def _compare(found, expected):
    """Return what is new and what is no longer needed, each with the term to use instead."""
    terms = {f"name: {word}": term for word, term in NAMES.items()}
    new = {
        f"{word} in {file}; say: {terms.get(word, 'see PROSE')}"
        for word, files in found.items()
        for file in files - expected.get(word, set())
    }
    stale = {f"{word} in {file}" for word, files in expected.items() for file in files - found.get(word, set())}
    return new, stale


def test_no_new_use_of_a_forbidden_word():
    new, stale = _compare(found_words(), OPEN)
    assert not new, "\n".join(sorted(new))
    assert not stale, "take these out of OPEN:\n" + "\n".join(sorted(stale))


def test_a_class_name_occurs_once():
    assert repeated_classes() == REPEATED


def test_every_module_has_a_docstring():
    assert undocumented_modules() == UNDOCUMENTED


def test_plain_english_is_allowed():
    allowed = "Change it in place, in place of the first. It takes place. The field at fault. The world size."
    assert not words_in_prose(allowed, "src/shadowtune/core/boundary.py")
    assert not words_in_name("usage_so_far") and not words_in_name("replace_all")


def test_words_are_found():
    assert words_in_prose("The dotted place of it, and the peers'\nway out.", "") == {"place", "peers", "way out"}
    assert words_in_prose("Each row of the batch.", "src/shadowtune/serving/x.py") == {"row of the batch"}
    assert words_in_name("FarSide") == {"far"} and words_in_name("_hand_over_rate") == {"hand_over"}


def _literal(name, annotation, entries):
    if not entries:
        return f"{name}: {annotation} = {'{}' if annotation.startswith('dict') else 'set()'}\n"
    return f"{name}: {annotation} = {{\n" + "".join(f"    {entry},\n" for entry in entries) + "}\n"


def _set(items):
    return "{" + ", ".join(f'"{item}"' for item in sorted(items)) + "}"


def current():
    """Return the lines between OPEN-BEGIN and OPEN-END that the code needs now."""
    words = [f'"{word}": {_set(files)}' for word, files in sorted(found_words().items())]
    return (
        _literal("OPEN", "dict[str, set[str]]", words)
        + _literal("REPEATED", "set[str]", [f'"{name}"' for name in sorted(repeated_classes())])
        + _literal("UNDOCUMENTED", "set[str]", [f'"{file}"' for file in sorted(undocumented_modules())])
    )


if __name__ == "__main__":
    print(current(), end="")
