"""Constrained decoding: output that fits a JSON schema, with token masks from llguidance.

llguidance was chosen by measurement (docs/log.md): it has no dependencies, and compiles a schema in less than a
millisecond, because it computes the mask of a grammar state when that state is reached.
"""

import importlib.util
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from shadowtune.serving.requests import RequestError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_SCHEMA = 100_000
"""Characters of a schema written as JSON."""
WHITESPACE = r"[ \n]?[ ]{0,16}"
"""White space between JSON tokens is bounded: small models would otherwise fill the output with line breaks."""
COMBINING = ("allOf", "if", "not", "dependentSchemas", "unevaluatedProperties")
"""Keywords of schemas that may define an object's properties elsewhere."""
PARAM = "response_format"


class SchemaMatcher:
    """State of one output in the grammar of its schema."""

    def __init__(self, matcher: "LLMatcher") -> None:
        self._matcher = matcher

    def restrict(self, scores: Tensor) -> Tensor:
        """Return scores (V,) with -inf for every token that the grammar does not allow next.

        Raises:
            RequestError: if the grammar exceeds llguidance's limits.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise RequestError(f"the schema cannot be followed: {_first_line(self._matcher.get_error())}", param=PARAM)
        allowed = np.unpackbits(bits, bitorder="little")[: len(scores)].astype(bool)
        mask = torch.zeros(len(scores), dtype=torch.bool)
        mask[: len(allowed)] = torch.from_numpy(allowed)
        return scores.masked_fill(~mask.to(scores.device), -torch.inf)

    def advance(self, token: int) -> None:
        """Advance by the sampled token.

        Raises:
            RequestError: if the grammar does not allow it, because no token of the vocabulary fits.
        """
        if not self._matcher.consume_token(token):
            raise RequestError(f"the schema cannot be followed: {_first_line(self._matcher.get_error())}", param=PARAM)

    @property
    def complete(self) -> bool:
        """Whether the output is complete and no token may follow."""
        return bool(self._matcher.is_stopped())


class SchemaCompiler:
    """Compiles JSON schemas for one vocabulary.

    Args:
        tokenizer: of the model.
        vocabulary: size of the model's vocabulary.
        ends: end-of-sequence token ids.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, ends: frozenset[int]) -> None:
        self._tokenizer, self._vocabulary, self._ends = tokenizer, vocabulary, ends
        self._prepared: LLTokenizer | None = None

    def compile(self, schema: Mapping[str, Any]) -> SchemaMatcher:
        """Compile a schema; the first call prepares the vocabulary, which takes a second or two.

        Raises:
            RequestError: 400 if the schema is invalid or not supported; 501 without llguidance.
        """
        check_size(schema)
        if importlib.util.find_spec("llguidance") is None:
            raise RequestError(
                "JSON schemas need llguidance on the server: pip install 'shadowtune[serve]'", 501, PARAM
            )
        from llguidance import LLMatcher

        try:
            grammar = LLMatcher.grammar_from_json_schema(
                close_objects(schema), defaults={"whitespace_pattern": WHITESPACE}
            )
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the schema cannot be read: {_first_line(str(error))}", param=PARAM) from None
        matcher = LLMatcher(self._tokenizer_of_llguidance(), grammar, log_level=0)
        if matcher.is_error():
            raise RequestError(f"the schema cannot be followed: {_first_line(matcher.get_error())}", param=PARAM)
        return SchemaMatcher(matcher)

    def _tokenizer_of_llguidance(self) -> "LLTokenizer":
        if self._prepared is None:
            from llguidance.hf import from_tokenizer

            if not isinstance(self._tokenizer, PreTrainedTokenizerFast):
                raise RequestError("JSON schemas need a fast tokenizer, which this model has not", 501, PARAM)
            ends = sorted(end for end in self._ends if end < self._vocabulary)
            self._prepared = from_tokenizer(self._tokenizer, self._vocabulary, ends or None)
        return self._prepared


def close_objects(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema with ``additionalProperties: false`` on objects that list properties and leave others open.

    OpenAI's strict schemas are closed, and output that fits the closed schema fits the open one. A small model would
    otherwise go on inventing properties until ``max_tokens``. Schemas with ``COMBINING`` keywords are left unchanged.
    """
    if any(f'"{word}"' in json.dumps(schema) for word in COMBINING):
        return dict(schema)
    closing: dict[str, Any] = _closed(schema)
    return closing


def _closed(schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    result = dict(schema)
    for name in ("properties", "$defs", "definitions"):
        if isinstance(result.get(name), Mapping):
            result[name] = {key: _closed(value) for key, value in result[name].items()}
    for name in ("items", "additionalProperties"):
        result |= {name: _closed(result[name])} if name in result else {}
    for name in ("anyOf", "oneOf", "prefixItems"):
        if isinstance(result.get(name), list) and (name == "prefixItems" or "properties" not in result):
            result[name] = [_closed(entry) for entry in result[name]]
    if "properties" in result and not result.keys() & {"additionalProperties", "patternProperties", "anyOf", "oneOf"}:
        result["additionalProperties"] = False
    return result


def check_size(schema: Mapping[str, Any]) -> None:
    """Raise RequestError if a schema is too large to be compiled."""
    size = len(json.dumps(schema))
    if size > MAX_SCHEMA:
        raise RequestError(f"the schema has {size} characters, and at most {MAX_SCHEMA} are taken", param=PARAM)


def _first_line(text: str) -> str:
    return " ".join((text.strip() or "unknown reason").splitlines()[0].split())[:300]
