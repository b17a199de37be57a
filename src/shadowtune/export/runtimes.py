"""Runtimes of detached models: torch, onnxruntime and llama.cpp behind one interface of greedy tokens and logits."""

import json
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Collection, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from shadowtune.compatibility import CACHE, cache_of
from shadowtune.core.deferral_head import DeferralHead
from shadowtune.errors import CheckpointError, ShadowtuneError
from shadowtune.export.onnx_file import DEFERRAL_OUTPUT, FILE, FIRST_LOGITS

FORCED = 1e6
"""Bias that makes a token the likeliest whatever the logits are."""
TOKEN_TIMEOUT = 300.0
"""Seconds without a token after which llama.cpp counts as stuck."""


class Runtime(ABC):
    """A model that continues one sequence of tokens."""

    prompt_seconds: float = 0.0
    """Time of the last ``generate`` until its first token."""

    @abstractmethod
    def logits(self, input_ids: list[int]) -> np.ndarray:
        """Return the logits (V,), float32, of the token after ``input_ids``; some runtimes add a constant."""

    @abstractmethod
    def generate(self, input_ids: list[int], max_new_tokens: int, ends: Collection[int] = ()) -> list[int]:
        """Return the likeliest tokens after ``input_ids``, one after the other, until one of ``ends`` (left out)."""


class TokenLogits(NamedTuple):
    """Output of a step at its last position."""

    logits: np.ndarray
    """(V,), float32."""
    deferral: tuple[float, float] | None
    """W s + c of the deferral head, for the token that is chosen here; None without a head."""


class Stepwise(Runtime):
    """A runtime that reads a few tokens at a time and keeps a key-value cache."""

    deferral_head: DeferralHead | None = None
    """Evaluated in each step of ``steps``."""

    @abstractmethod
    def _step(self, input_ids: list[int], cache: Any) -> tuple[TokenLogits, Any]:
        """Read tokens after those in ``cache`` (None at the start); return the last output and the longer cache."""

    def logits(self, input_ids: list[int]) -> np.ndarray:
        """Return the logits (V,) as the model computes them."""
        return self._step(input_ids, None)[0].logits

    def steps(self, input_ids: list[int]) -> Generator[TokenLogits, int, None]:
        """Yield the output for the token after ``input_ids``; for each token sent, that for the next one."""
        start = time.perf_counter()
        output, cache = self._step(input_ids, None)
        self.prompt_seconds = time.perf_counter() - start
        while True:
            token = yield output
            output, cache = self._step([token], cache)

    def generate(self, input_ids: list[int], max_new_tokens: int, ends: Collection[int] = ()) -> list[int]:
        """Return the likeliest tokens, each the largest of its logits."""
        steps = self.steps(input_ids)
        logits = next(steps).logits
        fresh: list[int] = []
        while len(fresh) < max_new_tokens and (token := int(logits.argmax())) not in ends:
            fresh.append(token)
            if len(fresh) < max_new_tokens:
                logits = steps.send(token).logits
        return fresh


class TorchModel(Stepwise):
    """A plain transformers model, or a directory of one."""

    def __init__(self, model: PreTrainedModel | str | Path, **kwargs: Any) -> None:
        """Take a model, or load a directory with the keywords of ``from_pretrained``."""
        loaded = (
            model
            if isinstance(model, PreTrainedModel)
            else AutoModelForCausalLM.from_pretrained(model, trust_remote_code=False, **kwargs)
        )
        self.model = loaded.eval()

    @torch.inference_mode()
    def _step(self, input_ids: list[int], cache: Any) -> tuple[TokenLogits, Any]:
        ids, head = torch.tensor([input_ids], device=self.model.device), self.deferral_head
        states = {} if head is None else {"output_hidden_states": True}
        output = self.model(ids, use_cache=True, logits_to_keep=1, **states, **{CACHE: cache})
        deferral = None
        if head is not None:
            first, second = head.logits(output.hidden_states[-1][0, -1]).tolist()
            deferral = (first, second)
        return TokenLogits(output.logits[0, -1].float().cpu().numpy(), deferral), cache_of(output)


class OnnxModel(Stepwise):
    """A directory with ``model.onnx`` and ``config.json``, in onnxruntime on the processor."""

    def __init__(self, directory: str | Path, threads: int = 0) -> None:
        """Open the directory; ``threads`` 0 leaves their number to onnxruntime."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        file = Path(directory) / FILE
        refusals = onnxruntime.capi.onnxruntime_pybind11_state
        try:
            self.session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except (refusals.Fail, refusals.InvalidProtobuf, refusals.InvalidGraph, refusals.NoSuchFile) as error:
            raise CheckpointError(f"onnxruntime cannot read {file}: {str(error).splitlines()[0]}") from None
        self.config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        self._deferral = any(entry.name == DEFERRAL_OUTPUT for entry in self.session.get_outputs())
        self._past = [entry for entry in self.session.get_inputs() if entry.name.startswith("past_key_values.")]

    def _step(self, input_ids: list[int], cache: Any) -> tuple[TokenLogits, Any]:
        if cache is None:
            cache = [np.zeros((1, entry.shape[1], 0, entry.shape[3]), np.float32) for entry in self._past]
        past = cache[0].shape[2]
        mask = np.ones((1, past + len(input_ids)), np.int64)
        mask[0, -1] = FIRST_LOGITS  # those of the last position are enough
        feed = {
            "input_ids": np.asarray([input_ids], np.int64),
            "attention_mask": mask,
            "position_ids": np.arange(past, past + len(input_ids), dtype=np.int64)[None],
            **{entry.name: array for entry, array in zip(self._past, cache, strict=True)},
        }
        logits, *cache = self.session.run(None, feed)
        deferral = None
        if self._deferral:  # the last output
            first, second = cache.pop()[0, -1].tolist()
            deferral = (first, second)
        return TokenLogits(logits[0, -1], deferral), cache


@dataclass(frozen=True)
class StreamedToken:
    """A token in llama.cpp's stream."""

    id: int
    text: str
    """Text that is complete with it."""
    logprob: float
    """Natural logarithm of its probability before sampling."""
    likely: list[tuple[int, float]]
    """The likeliest ids and their log-probabilities, best first."""
    made: int
    """Tokens generated so far. Tokens that are part of a character are not streamed by themselves."""


class GgufModel(Runtime):
    """A GGUF file in llama.cpp, on the processor, by the package ``xllamacpp``."""

    deferral_head: DeferralHead | None = None
    """For ``deferral_logits``."""

    def __init__(self, file: str | Path, context: int = 2048, threads: int = 0) -> None:
        """Load the file for sequences of up to ``context`` tokens; ``threads`` 0 leaves their number to llama.cpp."""
        self._file, self._context, self._threads = file, context, threads
        self.server = self._start()
        self._embedder: Any = None
        self._complete([0], 1)  # starts its thread; a server that is destroyed before that hangs

    def _start(self, embeds: bool = False) -> Any:
        """Start a server that listens on this machine alone, for completions or for the states of all tokens."""
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = str(self._file)
        settings.n_ctx, settings.n_parallel, settings.n_gpu_layers = self._context, 1, 0
        settings.warmup, settings.verbosity, settings.fit_params = False, 0, False
        if self._threads:
            settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = self._threads
        if embeds:
            settings.embedding, settings.embd_normalize = True, -1
            settings.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_NONE
            settings.n_batch = settings.n_ubatch = self._context
        try:
            return xllamacpp.Server(settings)
        except RuntimeError as error:
            raise CheckpointError(f"llama.cpp cannot read {self._file}: {error}") from None

    def deferral_logits(self, prompt: list[int], answer: list[int]) -> list[tuple[float, float]]:
        """Return W s + c of the deferral head for each token of an answer.

        llama.cpp gives either tokens or states, so this is a pass over both texts by a second instance of the model,
        which is loaded at the first call; its weights are the same pages of memory.
        """
        assert self.deferral_head is not None
        if self._embedder is None:
            self._embedder = self._start(embeds=True)
        body = {"content": prompt + answer[:-1], "embd_normalize": -1}
        with self._open("/embedding", body, self._embedder) as response:
            states = torch.tensor(json.load(response)[0]["embedding"])
        return [(first, second) for first, second in self.deferral_head.logits(states[len(prompt) - 1 :]).tolist()]

    def tokenize(self, text: str) -> list[int]:
        """Return llama.cpp's own token ids of a text, special tokens in it included."""
        return list(self._ask("/tokenize", content=text, add_special=True, parse_special=True)["tokens"])

    def logits(self, input_ids: list[int]) -> np.ndarray:
        """Return log-probabilities (V,) of the next token, -inf for those too unlikely to be reported."""
        answer = self._complete(input_ids, 1, n_probs=1_000_000)
        likely = answer["completion_probabilities"][0]["top_logprobs"]
        found = np.full(max(entry["id"] for entry in likely) + 1, -np.inf, np.float32)
        for entry in likely:
            found[entry["id"]] = entry["logprob"]
        return found

    def generate(self, input_ids: list[int], max_new_tokens: int, ends: Collection[int] = ()) -> list[int]:
        """Return llama.cpp's likeliest tokens; it stops by itself at the ends in the file.

        Without ``ends`` it never chooses these, and continues.
        """
        answer = self._complete(input_ids, max_new_tokens, ignore_eos=not ends)
        self.prompt_seconds = answer["timings"]["prompt_ms"] / 1000
        fresh = list(answer["tokens"])
        return fresh[: next((index for index, token in enumerate(fresh) if token in ends), len(fresh))]

    def stops_at(self, token: int, input_ids: list[int]) -> bool:
        """Return whether llama.cpp ends an answer by itself when this token is chosen after ``input_ids``."""
        answer = self._complete(input_ids, 2, logit_bias=[[token, FORCED]])
        return bool(answer["stop_type"] == "eos" and answer["tokens_predicted"] == 1)

    def stream(
        self, input_ids: list[int], max_new_tokens: int, likely: int, **settings: Any
    ) -> Iterator[StreamedToken]:
        """Yield tokens as llama.cpp chooses them, the one that ends the answer included; closing this stops it.

        Args:
            input_ids: the prompt.
            max_new_tokens: maximum number of tokens.
            likely: number of likeliest tokens to report with each, at least 1.
            settings: of llama.cpp's ``/completion``; greedy by default.
        """
        body = self._body(input_ids, max_new_tokens, n_probs=likely, stream=True, **settings)
        with self._open("/completion", body) as response:
            for line in response:
                event = json.loads(line.removeprefix(b"data: ")) if line.startswith(b"data: {") else {}
                for entry in event.get("completion_probabilities", ()):
                    best = [(other["id"], other["logprob"]) for other in entry["top_logprobs"]]
                    yield StreamedToken(
                        entry["id"], event["content"], entry["logprob"], best, event["tokens_predicted"]
                    )

    def _complete(self, input_ids: list[int], count: int, **settings: Any) -> dict[str, Any]:
        return self._ask("/completion", **self._body(input_ids, count, **settings))

    @staticmethod
    def _body(input_ids: list[int], count: int, **settings: Any) -> dict[str, Any]:
        fixed = {"temperature": 0, "samplers": ["temperature"], "cache_prompt": False, "return_tokens": True}
        return {"prompt": input_ids, "n_predict": count, **fixed, **settings}

    def _ask(self, path: str, **body: Any) -> dict[str, Any]:
        with self._open(path, body) as response:
            answer: dict[str, Any] = json.load(response)
        return answer

    def _open(self, path: str, body: dict[str, Any], server: Any = None) -> Any:
        headers, address = {"Content-Type": "application/json"}, (server or self.server).listening_address
        request = urllib.request.Request(address + path, json.dumps(body).encode(), headers)
        try:
            return urllib.request.urlopen(request, timeout=TOKEN_TIMEOUT)
        except urllib.error.HTTPError as error:
            content = json.load(error).get("error", {})
            raise ShadowtuneError(f"llama.cpp refuses {path}: {content.get('message', error.reason)}") from None
