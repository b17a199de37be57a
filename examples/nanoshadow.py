"""ShadowPEFT (https://arxiv.org/abs/2604.19254) in one file: train a shadow, use it attached, detached, as a drafter.

A frozen language model (the base) of L decoder blocks and width d is adapted by a small network that runs beside it
(the shadow). The shadow reads the same tokens and gives a state s, one vector of width d for each token. Between two
blocks of the base, the state is refined from the hidden state h, and h is corrected by a low-rank map of h - s:

    s0     = shadow_backbone(tokens)                                                        (Eq. 1)
    t, g   = T_l(LN(h)), sigmoid(G_l(LN(h)))      two-layer MLPs with SiLU, d -> k -> d      (Eq. 5, 6)
    s     <- (1 - g) * s + g * t                  not at the first boundary                  (Eq. 7)
    h     <- h + alpha * Drop((h - s) W_down[l]) W_up[l]      W_down: d x r, W_up: r x d     (Eq. 2-4)
    loss   = CE(base_head(h_L), y) + lambda * CE(base_head(s0), y)                          (Eq. 8, 9)

One training run leaves two models. *Attached*, base and shadow together, whose logits come from h_L. *Detached*, the
shadow alone, whose logits come from s0: a language model with as few blocks as the shadow has. While it answers, the
detached model can also draft tokens that the attached model then verifies, many in one pass.

    python examples/nanoshadow.py                          # SmolLM2-135M on 1,200 requests of CLINC150, two CPU cores
    python examples/nanoshadow.py --model tiny --steps 4   # a random base, to see that everything runs

It needs torch and transformers. The package `shadowtune` is the same method with everything that real use needs; its
tests hold this file's logits, loss and gradients equal to the package's (tests/examples/test_nanoshadow.py).
"""

import argparse
import copy
import gzip
import inspect
import json
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache

DATA = Path(__file__).parent.parent / "src/shadowtune/data/clinc150"
IGNORED = -100  # the label of a token that carries no loss


# --- the shadow ------------------------------------------------------------------------------------------------------


class Shadow(nn.Module):
    """The trained network: a backbone of its own, and the parameters of the L - 1 boundaries between blocks."""

    def __init__(self, base: PreTrainedModel, rank: int = 16, width: int = 8, alpha: float = 0.5) -> None:
        super().__init__()
        d, boundaries = base.config.hidden_size, base.config.num_hidden_layers - 1
        config = copy.deepcopy(base.config)
        config.num_hidden_layers = 1
        if config.to_dict().get("layer_types") is not None:
            config.layer_types = config.layer_types[:1]
        self.backbone = AutoModelForCausalLM.from_config(config, dtype=torch.float32).get_decoder()
        self.backbone.layers.load_state_dict(base.get_decoder().layers[:1].state_dict())  # start as the first block
        self.backbone.norm.load_state_dict(base.get_decoder().norm.state_dict())
        self.backbone.set_input_embeddings(None)  # it is fed the base's embeddings, which are frozen
        self.alpha = alpha
        uniform = lambda fan_in, *shape: nn.Parameter(torch.empty(shape).uniform_(-(fan_in**-0.5), fan_in**-0.5))  # noqa: E731
        self.injection_downs = nn.Parameter(0.05 * torch.randn(boundaries, d, rank))
        self.injection_ups = nn.Parameter(torch.zeros(boundaries, rank, d))  # so attached == base before training
        self.transform_downs = uniform(d, boundaries - 1, d, width)
        self.transform_ups = uniform(width, boundaries - 1, width, d)
        self.gate_downs = uniform(d, boundaries - 1, d, width)
        self.gate_ups = uniform(width, boundaries - 1, width, d)
        self.norm_weight, self.norm_bias = nn.Parameter(torch.ones(d)), nn.Parameter(torch.zeros(d))

    def boundary(self, index: int, h: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Eq. 2-7 between block ``index`` and the next: (h, s) -> (h', s'), all of shape (B, T, d)."""
        if index > 0:
            n, u = F.layer_norm(h, h.shape[-1:], self.norm_weight, self.norm_bias), index - 1
            t = F.silu(n @ self.transform_downs[u]) @ self.transform_ups[u]
            g = torch.sigmoid(F.silu(n @ self.gate_downs[u]) @ self.gate_ups[u])
            s = (1 - g) * s + g * t
        return h + self.alpha * ((h - s) @ self.injection_downs[index]) @ self.injection_ups[index], s


class State:
    """The shadow state s of one forward pass."""

    def __init__(self, shadow: Shadow, s0: Tensor) -> None:
        self.shadow, self.s = shadow, s0

    def before_block(self, block: int, h: Tensor) -> Tensor:
        """Apply the boundary in front of ``block`` (from 0); the first block has none."""
        if block > 0:
            h, self.s = self.shadow.boundary(block - 1, h, self.s)
        return h


def install_hooks(base: PreTrainedModel) -> None:
    """Let each block look for the keyword ``shadow`` of the running call; transformers hands unknown keywords down.

    The base's modules, names and weights stay as they are, and a call without the keyword is the plain base.
    """
    for depth, block in enumerate(base.get_decoder().layers):

        def hook(block: nn.Module, args: tuple, kwargs: dict, depth: int = depth) -> tuple | None:
            state = kwargs.get("shadow")
            return None if state is None else ((state.before_block(depth, args[0]), *args[1:]), kwargs)

        block.register_forward_pre_hook(hook, with_kwargs=True)


# --- base and shadow together ----------------------------------------------------------------------------------------


class ShadowModel:
    """A frozen base and its shadow; in decoding each has its own key-value cache."""

    def __init__(self, base: PreTrainedModel, shadow: Shadow) -> None:
        self.base, self.shadow = base.requires_grad_(False).eval(), shadow
        # transformers 5.24 calls it cache, before that it was past_key_values
        names = inspect.signature(base.get_decoder().forward).parameters
        self.cache_name = "cache" if "cache" in names else "past_key_values"
        install_hooks(base)

    def caches(self) -> tuple[DynamicCache, DynamicCache]:
        """Empty caches of the shadow's backbone and of the base."""
        return DynamicCache(config=self.shadow.backbone.config), DynamicCache(config=self.base.config)

    def run_shadow(self, ids: Tensor, mask: Tensor | None = None, cache: DynamicCache | None = None) -> Tensor:
        """Eq. 1: token ids (B, T) to s0 (B, T, d). ``mask`` is (B, past + T)."""
        keywords = {self.cache_name: cache, "use_cache": cache is not None}
        embeds = self.base.get_input_embeddings()(ids)
        return self.shadow.backbone(inputs_embeds=embeds, attention_mask=mask, **keywords).last_hidden_state

    def run_base(
        self, ids: Tensor, s0: Tensor | None, mask: Tensor | None = None, cache: DynamicCache | None = None
    ) -> Tensor:
        """Token ids (B, T) to the last hidden states h_L (B, T, d), beside the shadow unless ``s0`` is None."""
        keywords = {self.cache_name: cache, "use_cache": cache is not None}
        if s0 is not None:
            keywords["shadow"] = State(self.shadow, s0)
        return self.base.get_decoder()(input_ids=ids, attention_mask=mask, **keywords).last_hidden_state

    def head(self, states: Tensor) -> Tensor:
        """(..., d) to logits (..., V): both networks share the base's frozen head."""
        return self.base.get_output_embeddings()(states)

    def loss(
        self, ids: Tensor, labels: Tensor, mask: Tensor | None = None, weight: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropies of the attached and of the detached model; their sum, weighted by lambda, is Eq. 8.

        Only positions with a label reach the head: with prompts masked, that is a few percent of them.
        """
        s0 = self.run_shadow(ids, mask)
        h = self.run_base(ids, s0, mask)
        kept = labels[:, 1:] != IGNORED  # the state at token i predicts token i + 1
        targets = labels[:, 1:][kept]
        attached = F.cross_entropy(self.head(h[:, :-1][kept]), targets)
        return attached, weight * F.cross_entropy(self.head(s0[:, :-1][kept]), targets)


# --- generation ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def generate(model: ShadowModel, ids: Tensor, tokens: int, end: int, mode: str = "attached") -> list[int]:
    """Decode greedily, token by token, after a prompt ids (1, T). ``mode`` is attached, detached or base.

    Injection and update work on each token alone, so decoding with the two caches is exact.
    """
    shadow_cache, base_cache = model.caches()
    answer: list[int] = []
    while len(answer) < tokens and end not in answer:
        s0 = None if mode == "base" else model.run_shadow(ids, cache=shadow_cache)
        states = s0 if mode == "detached" else model.run_base(ids, s0, cache=base_cache)
        answer.append(int(model.head(states[:, -1]).argmax()))
        ids = torch.tensor([[answer[-1]]])
    return answer


@torch.no_grad()
def speculate(model: ShadowModel, ids: Tensor, tokens: int, end: int, drafts: int = 4) -> tuple[list[int], int]:
    """Decode as ``generate(mode="attached")`` does, in fewer passes of the base: the shadow drafts, one pass verifies.

    A draft is accepted where it is the attached model's own choice. The states s0 that drafting has computed are used
    again in the verifying pass. (A sliding window must hold the whole text: its cache cannot be cropped beyond.)
    Returns the answer and the number of passes of the base.
    """
    shadow_cache, base_cache = model.caches()
    answer: list[int] = []
    passes, last = 0, ids
    while len(answer) < tokens and end not in answer:
        drafted: list[int] = []
        states = [model.run_shadow(last, cache=shadow_cache)]
        for _ in range(min(drafts, tokens - len(answer) - 1)):
            drafted.append(int(model.head(states[-1][:, -1]).argmax()))
            states.append(model.run_shadow(torch.tensor([[drafted[-1]]]), cache=shadow_cache))
        tokens_in = torch.cat([last, torch.tensor([drafted], dtype=torch.long)], 1)
        h = model.run_base(tokens_in, torch.cat(states, 1), cache=base_cache)
        choices = model.head(h[:, last.shape[1] - 1 :]).argmax(-1)[0].tolist()  # after the last token and each draft
        passes += 1
        accepted = 0
        while accepted < len(drafted) and drafted[accepted] == choices[accepted] and drafted[accepted] != end:
            accepted += 1
        answer += choices[: accepted + 1]  # the accepted drafts, and one token of the attached model
        if accepted < len(drafted):  # remove what was not accepted
            for cache in (shadow_cache, base_cache):
                cache.crop(-(len(drafted) - accepted))
        last = torch.tensor([[answer[-1]]])
    return answer, passes


# --- data and training -----------------------------------------------------------------------------------------------


def read_examples(split: str, limit: int) -> list[dict[str, str]]:
    """Examples ``{"prompt": request, "completion": intent}``."""
    with gzip.open(DATA / f"{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines][:limit]


def encode(tokenizer: PreTrainedTokenizerBase, example: dict[str, str]) -> tuple[list[int], list[int]]:
    """Token ids of prompt and answer; the answer ends with the end token."""
    prompt = tokenizer(f"Request: {example['prompt']}\nIntent:")["input_ids"]
    return prompt, [*tokenizer(f" {example['completion']}")["input_ids"], tokenizer.eos_token_id]


def make_batch(examples: list[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
    """Pad on the right; prompts carry no loss."""
    longest = max(len(prompt) + len(answer) for prompt, answer in examples)
    ids, labels, mask = [], [], []
    for prompt, answer in examples:
        room = longest - len(prompt) - len(answer)
        ids.append(prompt + answer + [0] * room)
        labels.append([IGNORED] * len(prompt) + answer + [IGNORED] * room)
        mask.append([1] * (longest - room) + [0] * room)
    return {"ids": torch.tensor(ids), "labels": torch.tensor(labels), "mask": torch.tensor(mask)}


def train(model: ShadowModel, examples: list, steps: int, batch_size: int = 16, rate: float = 3e-3) -> None:
    """Train the shadow with AdamW; the base gets no gradient. Backbones learn at a third of the rate."""
    backbone = list(model.shadow.backbone.parameters())
    known = {id(parameter) for parameter in backbone}
    boundaries = [parameter for parameter in model.shadow.parameters() if id(parameter) not in known]
    groups = [{"params": boundaries, "lr": rate}, {"params": backbone, "lr": rate / 3}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    order, begin = random.Random(0), time.time()
    for step in range(steps):
        attached, detached = model.loss(**make_batch(order.sample(examples, batch_size)))
        optimizer.zero_grad()
        (attached + detached).backward()
        nn.utils.clip_grad_norm_(model.shadow.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step == steps - 1:
            seconds = time.time() - begin
            print(f"step {step:4d}  attached {attached:.3f}  detached {detached:.3f}  {seconds:4.0f} s", flush=True)


def accuracy(
    model: ShadowModel, tokenizer: PreTrainedTokenizerBase, examples: list[dict[str, str]], mode: str
) -> float:
    """Fraction of examples whose decoded answer is exactly the intent."""
    right = 0
    for example in examples:
        prompt, answer = encode(tokenizer, example)
        right += generate(model, torch.tensor([prompt]), len(answer), tokenizer.eos_token_id, mode) == answer
    return right / len(examples)


# --- command line ----------------------------------------------------------------------------------------------------


def load_base(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A Hub id or directory of a Llama-like model; or ``tiny``, a random one with SmolLM2's tokenizer."""
    where = Path.home() / ".cache/shadowtune/smollm2-135m-v1"  # where `shadowtune` keeps it; the Hub id otherwise
    smollm2 = str(where) if where.exists() else "HuggingFaceTB/SmolLM2-135M-Instruct"
    tokenizer = AutoTokenizer.from_pretrained(smollm2 if name in ("smollm2", "tiny") else name)
    if name != "tiny":
        return AutoModelForCausalLM.from_pretrained(
            smollm2 if name == "smollm2" else name, dtype=torch.float32
        ), tokenizer
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", vocab_size=len(tokenizer), **sizes)
    ), tokenizer


def main() -> None:
    """Train, compare the three modes on held-out examples, then decode speculatively."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="Hub id or directory of a Llama-like base, smollm2, or tiny")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--test", type=int, default=60, help="number of held-out examples")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    base, tokenizer = load_base(arguments.model)
    model = ShadowModel(base, Shadow(base))
    trained = sum(parameter.numel() for parameter in model.shadow.parameters())
    print(f"base {sum(parameter.numel() for parameter in base.parameters()):,} parameters, shadow {trained:,}")
    train(model, [encode(tokenizer, example) for example in read_examples("train", 1200)], arguments.steps)
    examples = read_examples("test", arguments.test)
    for mode in ("base", "attached", "detached"):
        begin = time.time()
        right = accuracy(model, tokenizer, examples, mode)
        print(f"{mode:9} {right:6.1%} of {len(examples)} requests right, {time.time() - begin:.1f} s")
    end, plain, fast, passes = tokenizer.eos_token_id, [], [], 0
    for example in examples[:10]:
        prompt = torch.tensor([encode(tokenizer, example)[0]])
        plain.append(generate(model, prompt, 8, end))
        answer, count = speculate(model, prompt, 8, end)
        fast.append(answer)
        passes += count
    print(f"drafting: same answers {plain == fast}, {sum(map(len, fast)) / passes:.2f} tokens a pass of the base")


if __name__ == "__main__":
    main()
