"""Requests to sequences: validation against the limits, tokenization, compiled schemas."""

from collections.abc import Iterable
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from shadowtune.data.encoding import prompt_ids
from shadowtune.data.generation import ends_of_config
from shadowtune.data.prompt_format import PromptFormat
from shadowtune.errors import DataError
from shadowtune.serving.constrained import SchemaCompiler
from shadowtune.serving.conversation import chat_token_ids, check_characters, longest_token, prompt_too_long
from shadowtune.serving.engine.adapter import Adapter, max_positions
from shadowtune.serving.engine.scheduler import Limits
from shadowtune.serving.engine.sequence import Deliver, Sampler, Sequence, TokenizedRequest
from shadowtune.serving.requests import GenerationRequest, RequestError

DEFAULT_MAX_MODEL_LEN = 2048
"""Tokens of a sequence where neither model nor limits bound it."""


class RequestProcessor:
    """Validates and tokenizes requests. An ``adapter`` of None is the bare base.

    Args:
        base: the model that all adapters share.
        tokenizer: its own.
        limits: of the engine.
    """

    def __init__(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, limits: Limits) -> None:
        self._base, self._tokenizer, self._limits = base, tokenizer, limits
        self._vocabulary = base.config.get_text_config(decoder=True).vocab_size
        self._base_format = PromptFormat()
        self._longest_token = longest_token(tokenizer)
        self._compilers: dict[frozenset[int], SchemaCompiler] = {}

    def takes_conversations(self, adapter: Adapter | None) -> bool:
        """Return whether a model takes system messages and earlier turns."""
        return self._format_of(adapter).takes_conversations(self._tokenizer)

    def max_model_len(self, adapter: Adapter | None) -> int:
        """Return the most tokens of prompt and output together."""
        known = [max_positions(self._base.config), self._limits.max_model_len, self._limits.max_tokens]
        known += [] if adapter is None else [adapter.max_positions]
        return min((each for each in known if each is not None), default=DEFAULT_MAX_MODEL_LEN)

    def check(self, request: GenerationRequest, adapter: Adapter | None) -> None:
        """Raise RequestError for what is invalid before the prompt is tokenized."""
        longest = self.max_model_len(adapter)
        check_characters(request, longest, self._longest_token)
        if request.prompt is not None and not isinstance(request.prompt, str) and len(request.prompt) >= longest:
            raise prompt_too_long(request, len(request.prompt), longest)
        if request.max_tokens is not None and request.max_tokens < 1:
            raise RequestError(f"max_tokens must be at least 1, got {request.max_tokens}", param="max_tokens")
        self._check_tokens(request.sampling.logit_bias, "logit_bias")
        self._check_tokens(request.stop_token_ids, "stop_token_ids")

    def tokenize(self, request: GenerationRequest, adapter: Adapter | None) -> TokenizedRequest:
        """Tokenize prompt and prediction, in any thread.

        Raises:
            RequestError: if they are invalid, or leave no position for the output.
        """
        prompt = self._prompt(request, self._format_of(adapter))
        longest = self.max_model_len(adapter)
        if len(prompt) >= longest:
            raise prompt_too_long(request, len(prompt), longest)
        prediction = [] if request.prediction is None else self._token_ids(request.prediction, "prediction")
        return TokenizedRequest(prompt, prediction)

    def sequence(
        self,
        request: GenerationRequest,
        adapter: Adapter | None,
        deliver: Deliver,
        tokenized: TokenizedRequest | None = None,
    ) -> Sequence:
        """Build the sequence of a request, in any thread.

        Args:
            request: to be decoded.
            adapter: that generates.
            deliver: receives the output.
            tokenized: of ``tokenize``; None calls it.

        Raises:
            RequestError: if the request is invalid.
        """
        self.check(request, adapter)
        tokenized = tokenized or self.tokenize(request, adapter)
        length, longest = len(tokenized.prompt), self.max_model_len(adapter)
        max_length = length + request.max_new_tokens(longest - length)
        if max_length > longest:
            raise RequestError(
                f"the prompt's {length} tokens and max_tokens {request.max_tokens} are more than the {longest} "
                f"tokens of {request.model!r}; ask for {longest - length} at most",
                param="max_tokens",
            )
        if request.min_tokens > max_length - length:
            raise RequestError(
                f"min_tokens {request.min_tokens} is more than the {max_length - length} tokens that the answer "
                "may have",
                param="min_tokens",
            )
        generation: GenerationConfig | None = (self._base if adapter is None else adapter.model).generation_config
        recorded = () if adapter is None else adapter.prompt_format.ends
        eos = frozenset(ends_of_config(generation, self._tokenizer, recorded))
        stop_tokens = frozenset(request.stop_token_ids) | (frozenset() if request.ignore_eos else eos)
        matcher = None if request.schema is None else self._compiler(eos).compile(request.schema)
        sampler = Sampler(request, length, stop_tokens | eos, self._base.device, generation, matcher)
        return Sequence(request, adapter, tokenized, max_length, stop_tokens, sampler, self._tokenizer, deliver)

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of token ids, special tokens included; raises RequestError for invalid ids."""
        tokens = list(tokens)
        self._check_tokens(tokens, "tokens")
        return str(self._tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _format_of(self, adapter: Adapter | None) -> PromptFormat:
        return self._base_format if adapter is None else adapter.prompt_format

    def _compiler(self, eos: frozenset[int]) -> SchemaCompiler:
        if eos not in self._compilers:
            self._compilers[eos] = SchemaCompiler(self._tokenizer, self._vocabulary, eos)
        return self._compilers[eos]

    def _prompt(self, request: GenerationRequest, prompt_format: PromptFormat) -> list[int]:
        if (request.messages is None) == (request.prompt is None):
            raise RequestError("give exactly one of messages and prompt", param="messages")
        param = "messages" if request.prompt is None else "prompt"
        try:
            if request.messages is not None:
                prompt = chat_token_ids(request, prompt_format, self._tokenizer)
            elif isinstance(request.prompt, str):
                prompt = prompt_ids(request.prompt, self._tokenizer, chat_template=False)
            else:
                prompt = self._token_ids(request.prompt, param)
        except DataError as error:
            raise RequestError(str(error), param=param) from None
        if not prompt:
            raise RequestError("the prompt is empty", param=param)
        return prompt

    def _token_ids(self, given: Any, param: str) -> list[int]:
        """Token ids of a text without special tokens, or the given ids, if they are in the vocabulary."""
        if isinstance(given, str):
            return list(self._tokenizer(given, add_special_tokens=False)["input_ids"])
        self._check_tokens(given, param)
        return list(given)

    def _check_tokens(self, tokens: Iterable[int], param: str) -> None:
        for token in tokens:
            if not 0 <= token < self._vocabulary:
                raise RequestError(
                    f"{param} has token {token}, but ids go from 0 to {self._vocabulary - 1}", param=param
                )
