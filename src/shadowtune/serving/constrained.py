"""Answers that fit a JSON schema: llguidance says after each token which tokens may follow.

llguidance was chosen by measurement (docs/log.md): it has no dependencies, and compiles a schema in less than a
millisecond, because it makes the mask of a state when that state is reached.
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
"""White space between JSON tokens is bounded: a small model would otherwise fill its answer with line breaks."""
COMBINING = ("allOf", "if", "not", "dependentSchemas", "unevaluatedProperties")
"""Words of schemas whose objects' properties may stand elsewhere."""
PARAM = "response_format"


class Follower:
    """Where one answer is in its schema.

    Args:
        matcher: of llguidance, at its start.
    """

    def __init__(self, matcher: "LLMatcher") -> None:
        self._matcher = matcher

    def restrict(self, scores: Tensor) -> Tensor:
        """Return scores (V,) with -inf for every token that may not come next.

        Raises:
            RequestError: if the schema has grown beyond llguidance's limits.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise RequestError(f"the schema cannot be followed: {_first_line(self._matcher.get_error())}", param=PARAM)
        allowed = np.unpackbits(bits, bitorder="little")[: len(scores)].astype(bool)
        mask = torch.zeros(len(scores), dtype=torch.bool)
        mask[: len(allowed)] = torch.from_numpy(allowed)
        return scores.masked_fill(~mask.to(scores.device), -torch.inf)

    def advance(self, token: int) -> None:
        """Take the token that was chosen.

        Raises:
            RequestError: if the vocabulary has no token that could follow.
        """
        if not self._matcher.consume_token(token):
            raise RequestError(f"the schema cannot be followed: {_first_line(self._matcher.get_error())}", param=PARAM)

    @property
    def complete(self) -> bool:
        """Whether nothing may follow."""
        return bool(self._matcher.is_stopped())


class Schemas:
    """Compiles schemas for one vocabulary.

    Args:
        tokenizer: of the model.
        vocabulary: tokens that the model chooses from.
        ends: tokens that end an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, ends: frozenset[int]) -> None:
        self._tokenizer, self._vocabulary, self._ends = tokenizer, vocabulary, ends
        self._prepared: LLTokenizer | None = None

    def follower(self, schema: Mapping[str, Any]) -> Follower:
        """Compile a schema; the first call takes a second or two for the vocabulary.

        Raises:
            RequestError: 400 if it is no schema, or one that cannot be followed; 501 without llguidance.
        """
        check_size(schema)
        if importlib.util.find_spec("llguidance") is None:
            raise RequestError(
                "JSON schemas need llguidance on the server: pip install 'shadowtune[serve]'", 501, PARAM
            )
        from llguidance import LLMatcher

        try:
            grammar = LLMatcher.grammar_from_json_schema(closed(schema), defaults={"whitespace_pattern": WHITESPACE})
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the schema cannot be read: {_first_line(str(error))}", param=PARAM) from None
        matcher = LLMatcher(self._tokenizer_of_llguidance(), grammar, log_level=0)
        if matcher.is_error():
            raise RequestError(f"the schema cannot be followed: {_first_line(matcher.get_error())}", param=PARAM)
        return Follower(matcher)

    def _tokenizer_of_llguidance(self) -> "LLTokenizer":
        if self._prepared is None:
            from llguidance.hf import from_tokenizer

            if not isinstance(self._tokenizer, PreTrainedTokenizerFast):
                raise RequestError("JSON schemas need a fast tokenizer, which this model has not", 501, PARAM)
            ends = sorted(end for end in self._ends if end < self._vocabulary)
            self._prepared = from_tokenizer(self._tokenizer, self._vocabulary, ends or None)
        return self._prepared


def closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema with objects that list their properties and say nothing of others closed to these.

    OpenAI's strict schemas are closed, and what fits the closed schema fits the open one. A small model would otherwise
    go on inventing properties until its answer is cut off. Schemas that are combined with others stay as they are.
    """
    if any(f'"{word}"' in json.dumps(schema) for word in COMBINING):
        return dict(schema)
    closing: dict[str, Any] = _closed(schema)
    return closing


def _closed(schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    told = dict(schema)
    for name in ("properties", "$defs", "definitions"):
        if isinstance(told.get(name), Mapping):
            told[name] = {key: _closed(value) for key, value in told[name].items()}
    for name in ("items", "additionalProperties"):
        told |= {name: _closed(told[name])} if name in told else {}
    for name in ("anyOf", "oneOf", "prefixItems"):
        if isinstance(told.get(name), list) and (name == "prefixItems" or "properties" not in told):
            told[name] = [_closed(entry) for entry in told[name]]
    if "properties" in told and not told.keys() & {"additionalProperties", "patternProperties", "anyOf", "oneOf"}:
        told["additionalProperties"] = False
    return told


def check_size(schema: Mapping[str, Any]) -> None:
    """Refuse a schema that is too large to be compiled; raises RequestError."""
    size = len(json.dumps(schema))
    if size > MAX_SCHEMA:
        raise RequestError(f"the schema has {size} characters, and at most {MAX_SCHEMA} are taken", param=PARAM)


def _first_line(text: str) -> str:
    return " ".join((text.strip() or "unknown reason").splitlines()[0].split())[:300]
