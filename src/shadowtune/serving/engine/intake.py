"""What a request must be to get a row: its prompt as tokens, within the limits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shadowtune.data.encoding import prompt_ids
from shadowtune.data.prompt_format import PromptFormat
from shadowtune.errors import DataError
from shadowtune.serving.constrained import Schemas
from shadowtune.serving.conversation import check_characters, conversation_ids, longest_token, too_long
from shadowtune.serving.engine.adapters import Adapter, ends_of, positions_of
from shadowtune.serving.engine.limits import Limits
from shadowtune.serving.engine.rows import Deliver, Row
from shadowtune.serving.requests import Request, RequestError


@dataclass(frozen=True)
class Prepared:
    """What takes long of a request, and is the same for each of its answers."""

    prompt: list[int]
    prediction: list[int]


class Intake:
    """Makes rows of requests.

    Args:
        base: the model that all share.
        tokenizer: its own.
        limits: of the engine.
    """

    def __init__(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, limits: Limits) -> None:
        self._base, self._tokenizer, self._limits = base, tokenizer, limits
        self._vocabulary = base.config.get_text_config(decoder=True).vocab_size
        self._format = PromptFormat()
        self._longest_token = longest_token(tokenizer)
        self._schemas: dict[frozenset[int], Schemas] = {}

    def reads(self, adapter: Adapter | None) -> bool:
        """Say whether a model, None being the bare base, reads system messages and earlier turns."""
        form = self._format if adapter is None else adapter.prompt_format
        return form.takes_conversations(self._tokenizer)

    def longest(self, adapter: Adapter | None) -> int:
        """Tokens that prompt and answer of a model, None being the bare base, may have together."""
        known = [positions_of(self._base.config), self._limits.max_model_len, self._limits.max_tokens]
        known += [] if adapter is None else [adapter.positions]
        return min((each for each in known if each is not None), default=FALLBACK)

    def check(self, request: Request, adapter: Adapter | None) -> None:
        """Refuse what can be refused without reading the prompt; raises RequestError."""
        longest = self.longest(adapter)
        check_characters(request, longest, self._longest_token)
        if request.prompt is not None and not isinstance(request.prompt, str) and len(request.prompt) >= longest:
            raise too_long(request, len(request.prompt), longest)
        if request.max_tokens is not None and request.max_tokens < 1:
            raise RequestError(f"max_tokens must be at least 1, got {request.max_tokens}", param="max_tokens")
        for token in request.sampling.logit_bias:
            self._check_token(token, "logit_bias")
        for token in request.stop_tokens:
            self._check_token(token, "stop_token_ids")

    def prepare(self, request: Request, adapter: Adapter | None) -> Prepared:
        """Turn prompt and prediction into token ids, in any thread.

        Raises:
            RequestError: if they cannot be, or leave no room for an answer.
        """
        prompt = self._prompt(request, self._format if adapter is None else adapter.prompt_format)
        longest = self.longest(adapter)
        if len(prompt) >= longest:
            raise too_long(request, len(prompt), longest)
        prediction = [] if request.prediction is None else self._tokens(request.prediction, "prediction", False)
        return Prepared(prompt, prediction)

    def row(self, request: Request, adapter: Adapter | None, deliver: Deliver, prepared: Prepared | None = None) -> Row:
        """Make the row of a request; in any thread.

        Args:
            request: what is asked.
            adapter: whose answer it is; None for the bare base.
            deliver: where the answer goes.
            prepared: of ``prepare``, if that was called already.

        Raises:
            RequestError: if it is not one that can be answered.
        """
        self.check(request, adapter)
        prompt, longest = (prepared or self.prepare(request, adapter)), self.longest(adapter)
        length = len(prompt.prompt)
        room = length + request.wanted(longest - length)
        if room > longest:
            raise RequestError(
                f"the prompt's {length} tokens and max_tokens {request.max_tokens} are more than the {longest} "
                f"tokens of {request.model!r}; ask for {longest - length} at most",
                param="max_tokens",
            )
        if request.min_tokens > room - length:
            raise RequestError(
                f"min_tokens {request.min_tokens} is more than the {room - length} tokens that the answer may have",
                param="min_tokens",
            )
        generation: Any = self._base.generation_config if adapter is None else adapter.model.generation_config
        recorded = () if adapter is None else adapter.prompt_format.ends
        ends = ends_of(generation, self._tokenizer, recorded)
        follower = None if request.schema is None else self._schemas_of(ends).follower(request.schema)
        device, tokenizer = self._base.device, self._tokenizer
        ids = (prompt.prompt, prompt.prediction)
        return Row(request, adapter, *ids, room, ends, tokenizer, device, deliver, generation, follower)

    def text_of(self, tokens: Sequence[int]) -> str:
        """Return the text of token ids, special tokens included; raises RequestError for ids that are none."""
        for token in tokens:
            self._check_token(token, "tokens")
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _schemas_of(self, ends: frozenset[int]) -> Schemas:
        if ends not in self._schemas:
            self._schemas[ends] = Schemas(self._tokenizer, self._vocabulary, ends)
        return self._schemas[ends]

    def _prompt(self, request: Request, prompt_format: PromptFormat) -> list[int]:
        if (request.messages is None) == (request.prompt is None):
            raise RequestError("give exactly one of messages and prompt", param="messages")
        if request.messages is None:
            assert request.prompt is not None
            prompt = self._tokens(request.prompt, "prompt", True)
        else:
            try:
                prompt = conversation_ids(request, prompt_format, self._tokenizer)
            except DataError as error:
                raise RequestError(str(error), param="messages") from None
        if not prompt:
            raise RequestError("the prompt is empty", param="messages" if request.prompt is None else "prompt")
        return prompt

    def _tokens(self, given: Any, param: str, special: bool) -> list[int]:
        """Token ids of a text, or the given ones if they are tokens of this model."""
        if isinstance(given, str):
            if not special:
                return list(self._tokenizer(given, add_special_tokens=False)["input_ids"])
            try:
                return prompt_ids(given, self._tokenizer, chat_template=False)
            except DataError as error:
                raise RequestError(str(error), param=param) from None
        for token in given:
            self._check_token(token, param)
        return list(given)

    def _check_token(self, token: int, param: str) -> None:
        if not 0 <= token < self._vocabulary:
            raise RequestError(f"{param} has token {token}, but ids go from 0 to {self._vocabulary - 1}", param=param)


FALLBACK = 2048
"""Tokens of a row where neither model nor limits say how many it may have."""
