"""Stage 1: the text encoder learns to say what stands where, before it meets the UNet.

The last states of a prompt, which no caption reaches and which have seen all of it, speak for five
places of the picture, one each. A state is the sum of codes, fixed orthogonal vectors: one of its
place, one each of the colour, shape and size of what stands there, one of the background. So what a
UNet would need many pictures to find (which colour belongs to which shape, and where it goes) is a
look-up for its cross-attention: a key holds the place, a value what is painted there. States
without a code of their place held what stands there just as well, but a UNet that learned from them
painted the right objects and left to chance which of them goes where.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTokenizer

from tools.demo_diffusion import network, ranks, scenes

BATCH = 64
LEARNING_RATE = 2e-3
EMBEDDING_STD = 0.3  # CLIP's 0.02 lets a word's own meaning drown at first
EMPTY_CAPTIONS = 0.05

# Place 0 is the middle, for an only object; the others are the relations' directions.
_PLACES = [(0, 0), *scenes.RELATIONS.values()]
# What a state tells: how long its code is, and how many answers there are (0: nothing).
# Long codes are learned from soonest; 4 is the standard deviation of a state's numbers.
_FACTS = {
    "place": (20.0, 1 + len(_PLACES)),
    "colour": (24.0, 1 + len(scenes.COLOURS)),
    "shape": (24.0, 1 + len(scenes.SHAPES)),
    "size": (12.0, 1 + len(scenes.RADII)),
    "background": (12.0, 1 + len(scenes.BACKGROUNDS)),
}
_STATE_STD = 4.0
_SHARPNESS = 10.0  # of the logits


def train(tokenizer: CLIPTokenizer, steps: int, seed: int) -> CLIPTextModel:
    """A text encoder trained for ``steps`` batches of training captions."""
    torch.manual_seed(seed)
    codes = _codes()
    rng = np.random.default_rng([seed, 1, ranks.rank()])
    captions = scenes.captions(rng)
    model = network.text_encoder(tokenizer)
    for name, weight in model.named_parameters():
        if name.endswith(("token_embedding.weight", "position_embedding.weight")):
            nn.init.normal_(weight, std=EMBEDDING_STD)
        if name.endswith("final_layer_norm.weight"):
            nn.init.constant_(weight, _STATE_STD)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    right = 0.0
    for step in range(steps):
        rate = LEARNING_RATE * min(1, (step + 1) / 100) * (1 - step / steps)
        optimizer.param_groups[0]["lr"] = rate
        told = [_told(next(captions), rng) for _ in range(BATCH // ranks.count())]
        tokens = network.tokenize(tokenizer, [text for text, _ in told])
        answers = torch.tensor(np.stack([facts for _, facts in told]))  # [BATCH, tokens, facts]
        loss, heard = _ask(model(tokens).last_hidden_state, answers, codes)
        optimizer.zero_grad()
        loss.backward()
        ranks.average_gradients(model.parameters())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        right += 0.02 * ((heard == answers).flatten(1).all(1).float().mean().item() - right)
        if ranks.rank() == 0 and step % 100 == 99:
            print(f"text encoder {step + 1}/{steps}: {right:.1%} wholly right", flush=True)
    return model


def _ask(
    states: torch.Tensor, answers: torch.Tensor, codes: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of the states, [n, tokens, TEXT_WIDTH], and the answers nearest to them.

    Squared errors alone stop where a state holds a little of every answer, the entropies alone
    let what they need not tell apart drown in the rest.
    """
    wanted = sum(code[answers[..., fact]] for fact, code in enumerate(codes))
    loss = functional.mse_loss(states, wanted) / _STATE_STD**2
    heard = []
    for code, answer in zip(codes, answers.unbind(-1), strict=True):
        shares = states @ code.T / code.square().sum(1)  # 1 of the right answer, 0 of the others
        loss = loss + functional.cross_entropy(_SHARPNESS * shares.flatten(0, 1), answer.flatten())
        heard.append(shares.argmax(-1))
    return loss, torch.stack(heard, -1)


def _codes() -> list[torch.Tensor]:
    """Of each fact, the codes of its answers, [answers, TEXT_WIDTH]."""
    counts = [count for _, count in _FACTS.values()]
    orthogonal = nn.init.orthogonal_(torch.empty(sum(counts), network.TEXT_WIDTH))
    # States are normalized: their mean is 0.
    centred = torch.linalg.qr((orthogonal - orthogonal.mean(1, keepdim=True)).T).Q.T
    lengths = [length for length, _ in _FACTS.values()]
    pairs = zip(lengths, centred.split(counts), strict=True)
    return [length * codes for length, codes in pairs]


def _told(caption: scenes.Caption, rng: np.random.Generator) -> tuple[str, NDArray[np.int64]]:
    """A caption's text (an empty one now and then) and its facts, [MAX_TOKENS, facts]."""
    answers = np.zeros((network.MAX_TOKENS, len(_FACTS)), np.int64)
    places = answers[-len(_PLACES) :]
    places[:, 0] = np.arange(len(_PLACES)) + 1
    if rng.random() < EMPTY_CAPTIONS:
        return "", answers
    places[:, 4] = list(scenes.BACKGROUNDS).index(caption.background or scenes.BACKGROUND) + 1
    right, down = scenes.RELATIONS.get(caption.relation or "", (0, 0))
    directions = [(right, down), (-right, -down)]
    for item, direction in zip(caption.items, directions, strict=False):
        colours, shapes, sizes = list(scenes.COLOURS), list(scenes.SHAPES), list(scenes.RADII)
        places[_PLACES.index(direction), 1:4] = (
            colours.index(item.colour) + 1,
            shapes.index(item.shape) + 1,
            sizes.index(item.size) + 1,
        )
    return str(caption), answers
