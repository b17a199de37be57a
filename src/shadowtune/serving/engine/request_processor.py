"""Requests to sequences: the limits of engine and adapter, tokenization, compiled schemas."""

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from shadowtune.data.generation import ends_of_config
from shadowtune.data.prompt_format import PromptFormat
from shadowtune.serving.constrained import SchemaCompiler
from shadowtune.serving.engine.adapter import Adapter, max_positions
from shadowtune.serving.engine.scheduler import Limits
from shadowtune.serving.engine.sequence import Deliver, Sampler, Sequence, TokenizedRequest
from shadowtune.serving.requests import GenerationRequest
from shadowtune.serving.validation import RequestValidator

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
        self._base, self._limits = base, limits
        self._vocabulary = base.config.get_text_config(decoder=True).vocab_size
        self.validator = RequestValidator(tokenizer, self._vocabulary)
        self._base_format = PromptFormat()
        self._compilers: dict[frozenset[int], SchemaCompiler] = {}

    def takes_conversations(self, adapter: Adapter | None) -> bool:
        """Return whether a model takes system messages and earlier turns."""
        return self._format_of(adapter).takes_conversations(self.validator.tokenizer)

    def max_model_len(self, adapter: Adapter | None) -> int:
        """Return the most tokens of prompt and output together."""
        known = [max_positions(self._base.config), self._limits.max_model_len, self._limits.max_tokens]
        known += [] if adapter is None else [adapter.max_positions]
        return min((each for each in known if each is not None), default=DEFAULT_MAX_MODEL_LEN)

    def check(self, request: GenerationRequest, adapter: Adapter | None) -> None:
        """Raise RequestError for what is invalid before the prompt is tokenized."""
        self.validator.check(request, self.max_model_len(adapter))

    def tokenize(self, request: GenerationRequest, adapter: Adapter | None) -> TokenizedRequest:
        """Tokenize prompt and prediction, in any thread.

        Raises:
            RequestError: if they are invalid, or leave no position for the output.
        """
        prompt = self.validator.prompt(request, self._format_of(adapter), self.max_model_len(adapter))
        prediction = [] if request.prediction is None else self.validator.token_ids(request.prediction, "prediction")
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
        length = len(tokenized.prompt)
        max_length = length + self.validator.max_new_tokens(request, length, self.max_model_len(adapter))
        generation: GenerationConfig | None = (self._base if adapter is None else adapter.model).generation_config
        recorded = () if adapter is None else adapter.prompt_format.ends
        eos = frozenset(ends_of_config(generation, self.validator.tokenizer, recorded))
        stop_tokens = frozenset(request.stop_token_ids) | (frozenset() if request.ignore_eos else eos)
        matcher = None if request.schema is None else self._compiler(eos).compile(request.schema)
        sampler = Sampler(request, length, stop_tokens | eos, self._base.device, generation, matcher)
        return Sequence(
            request, adapter, tokenized, max_length, stop_tokens, sampler, self.validator.tokenizer, deliver
        )

    def _format_of(self, adapter: Adapter | None) -> PromptFormat:
        return self._base_format if adapter is None else adapter.prompt_format

    def _compiler(self, eos: frozenset[int]) -> SchemaCompiler:
        if eos not in self._compilers:
            self._compilers[eos] = SchemaCompiler(self.validator.tokenizer, self._vocabulary, eos)
        return self._compilers[eos]
