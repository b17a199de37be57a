"""How often one model would have said what another one said: what speculation and hand-over live on."""

from collections.abc import Sequence
from typing import Any

import torch

from shadowtune.data.collate import left_pad
from shadowtune.errors import DataError


@torch.inference_mode()
def top1_agreement(
    model: Any,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    pad_token_id: int,
    batch_size: int = 32,
) -> float:
    """Share of the answers' tokens that ``model`` finds most likely, having read the prompt and the answer up to there.

    With the greedy answers of the attached model and the shadow alone as ``model``, this is the share of tokens that
    a draft of one token would get accepted.

    Args:
        model: a causal language model; it is left in eval mode.
        prompts: token ids of each prompt, at least one.
        answers: token ids of each answer, the end-of-sequence token included where it was said.
        pad_token_id: fills batches on the left.

    Raises:
        DataError: if no answer has a token.
    """
    if not any(answers):
        raise DataError("no answer has a token to agree on")
    model.eval()
    rows = sorted(zip(prompts, answers, strict=True), key=lambda row: len(row[0]) + len(row[1]))
    agreed = 0
    for start in range(0, len(rows), batch_size):
        chosen = rows[start : start + batch_size]
        batch = left_pad([[*prompt, *answer] for prompt, answer in chosen], pad_token_id)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        lengths = torch.tensor([[len(answer)] for _, answer in chosen], device=model.device)
        longest = int(lengths.max())
        logits = model(**batch, logits_to_keep=longest + 1).logits[:, :-1]
        said = batch["input_ids"][:, -longest:] if longest else batch["input_ids"][:, :0]
        place = torch.arange(longest, 0, -1, device=model.device)  # counted from the end
        agreed += int(((logits.argmax(-1) == said) & (place <= lengths)).sum())
    return agreed / sum(len(answer) for answer in answers)
