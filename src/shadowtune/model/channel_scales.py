"""How large a base's hidden states usually are in front of each of its blocks, the whole and each channel.

A few channels of trained models are huge in every token (Sun et al., 2024, https://arxiv.org/abs/2402.17762), whatever
the text; so random tokens show which. First tokens are left out, in which some channels are larger still.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shadowtune.attach.architectures import architecture_of

ROWS, LENGTH = 8, 32
"""Random tokens to look at."""
LARGEST = 20.0
"""A channel that is hardly ever used is scaled up no further than this."""


def measure_channel_scales(base: PreTrainedModel) -> Tensor:
    """Return c (L, d), float32, by which the channels of each block's input become alike, and the whole as it was.

    With x the input of a block, c_i is proportional to 1 / rms(x_i), and the mean of (c_i x_i)^2 is that of x_i^2.
    """
    squares = measure_squares(base)
    mean = squares.mean(-1, keepdim=True)
    scales = (mean / squares).sqrt().clamp(max=LARGEST)
    return scales * (mean / (squares * scales**2).mean(-1, keepdim=True)).sqrt()


def measure_input_sizes(base: PreTrainedModel) -> Tensor:
    """Return the root mean square of each block's input (L,), float32."""
    return measure_squares(base).mean(-1).sqrt()


@torch.no_grad()
def measure_squares(base: PreTrainedModel) -> Tensor:
    """Return the mean squares of each channel of each block's input (L, d), float32."""
    architecture = architecture_of(base.config)
    vocabulary = base.config.get_text_config(decoder=True).vocab_size
    tokens = torch.randint(vocabulary, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []
    handles = [
        block.register_forward_pre_hook(lambda module, args: seen.append(args[0][:, 1:].float().pow(2).mean((0, 1))))
        for block in architecture.blocks_of(base)
    ]
    training = base.training
    try:
        architecture.decoder_of(base.eval())(input_ids=tokens.to(base.device), use_cache=False)
    finally:
        base.train(training)
        for handle in handles:
            handle.remove()
    return torch.stack([square.to("cpu") for square in seen]).clamp(min=1e-12)
