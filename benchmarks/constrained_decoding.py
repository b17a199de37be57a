"""Compare constrained-decoding libraries: time to compile a JSON schema, and to compute the mask of each token.

    python benchmarks/constrained_decoding.py

Each library that is installed follows the tokens of a document that fits the schema, with SmolLM2's vocabulary of
49,152 tokens; a library that rejects one of them is reported. Times are medians of ``REPEATS`` runs, in milliseconds.
"""

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from transformers import AutoTokenizer

from shadowtune.models import smollm2_135m

REPEATS = 5
ADDRESS = {
    "type": "object",
    "properties": {"street": {"type": "string"}, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
    "required": ["street", "zip"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, tuple[dict[str, Any], Any]] = {
    "any object": ({"type": "object"}, {"a": [1, {"b": "text of some length, to be read"}], "c": None}),
    "person": (
        {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "age": {"type": "integer", "minimum": 0, "maximum": 150},
                "kind": {"enum": ["human", "robot"]},
                "address": ADDRESS,
                "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 8},
            },
            "required": ["name", "age", "kind", "address", "tags"],
            "additionalProperties": False,
        },
        {
            "name": "Ada Lovelace",
            "age": 36,
            "kind": "human",
            "address": {"street": "12 St James's Square", "zip": "10115"},
            "tags": ["mathematics", "engines", "poetry"],
        },
    ),
    "recursive": (
        {
            "$defs": {
                "node": {
                    "type": "object",
                    "properties": {
                        "value": {"type": "number"},
                        "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
                    },
                    "required": ["value", "children"],
                    "additionalProperties": False,
                }
            },
            "$ref": "#/$defs/node",
        },
        {"value": 1.5, "children": [{"value": 2, "children": [{"value": 3, "children": []}]}]},
    ),
}


class Follower(NamedTuple):
    """One compiled schema."""

    mask: Callable[[], Any]
    advance: Callable[[int], bool]


Compile = Callable[[dict[str, Any]], Follower]


def of_llguidance(tokenizer: Any) -> Compile:
    """Prepare llguidance."""
    import llguidance
    import llguidance.hf

    own = llguidance.hf.from_tokenizer(tokenizer)

    def compiled(schema: dict[str, Any]) -> Follower:
        matcher = llguidance.LLMatcher(own, llguidance.LLMatcher.grammar_from_json_schema(schema))
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        return Follower(matcher.compute_bitmask, matcher.consume_token)

    return compiled


def of_xgrammar(tokenizer: Any) -> Compile:
    """Prepare xgrammar."""
    import xgrammar

    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer)

    def compiled(schema: dict[str, Any]) -> Follower:
        compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        matcher = xgrammar.GrammarMatcher(compiler.compile_json_schema(json.dumps(schema)))
        bits = xgrammar.allocate_token_bitmask(1, info.vocab_size)
        return Follower(lambda: matcher.fill_next_token_bitmask(bits), matcher.accept_token)

    return compiled


def of_outlines_core(tokenizer: Any) -> Compile:
    """Prepare outlines-core."""
    import outlines_core
    from outlines_core.json_schema import build_regex_from_schema

    vocabulary: dict[bytes, list[int]] = {}
    for token in range(len(tokenizer)):
        if token != tokenizer.eos_token_id and (text := tokenizer.decode([token])):
            vocabulary.setdefault(text, []).append(token)  # type: ignore[call-overload]
    own = outlines_core.Vocabulary(tokenizer.eos_token_id, vocabulary)

    def compiled(schema: dict[str, Any]) -> Follower:
        guide = outlines_core.Guide(outlines_core.Index(build_regex_from_schema(json.dumps(schema)), own))

        def advance(token: int) -> bool:
            allowed = token in guide.get_tokens()
            if allowed:
                guide.advance(token, False)
            return allowed

        return Follower(guide.get_tokens, advance)

    return compiled


LIBRARIES: dict[str, Callable[[Any], Compile]] = {
    "llguidance": of_llguidance,
    "xgrammar": of_xgrammar,
    "outlines_core": of_outlines_core,
}


def milliseconds(function: Callable[[], Any]) -> tuple[float, Any]:
    """Return how long a call takes, and its result."""
    begun = time.perf_counter()
    result = function()
    return 1000 * (time.perf_counter() - begun), result


def main() -> None:
    """Print a table."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_135m(), trust_remote_code=False)
    print("| library | tokenizer | schema | compile | mask, median | mask, worst | tokens followed |")
    print("|---|--:|---|--:|--:|--:|--:|")
    for name, prepare in LIBRARIES.items():
        try:
            preparing, compiled = milliseconds(partial(prepare, tokenizer))
        except ImportError as error:
            print(f"| {name} | not installed: {error} |")
            continue
        for label, (schema, document) in SCHEMAS.items():
            tokens = tokenizer.encode(json.dumps(document), add_special_tokens=False)
            compiling, masks, followed = [], [], 0
            try:
                for _ in range(REPEATS):
                    took, matcher = milliseconds(partial(compiled, schema))
                    compiling.append(took)
                    followed = 0
                    for token in tokens:
                        masks.append(milliseconds(matcher.mask)[0])
                        if not matcher.advance(token):
                            break
                        followed += 1
            except (ValueError, RuntimeError) as error:
                print(f"| {name} | {preparing:.0f} | {label} | fails: {str(error).splitlines()[0][:60]} |")
                continue
            cells = [statistics.median(compiling), statistics.median(masks), max(masks)]
            print(f"| {name} | {preparing:.0f} | {label} | " + " | ".join(f"{cell:.3f}" for cell in cells), end="")
            print(f" | {followed} of {len(tokens)} |")


if __name__ == "__main__":
    main()
