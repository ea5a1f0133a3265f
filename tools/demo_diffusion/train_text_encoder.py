"""Stage 1: the text encoder learns to tell what stands where, before it meets the UNet.

Linear heads read, from the state after a caption's end, the colour, shape and size at five places
of the picture and the background. The heads are thrown away. What a UNet would need many pictures
to find (which colour belongs to which shape, and where it goes) is then already a linear function
of the states that it attends to.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTokenizer

from tools.demo_diffusion import network, ranks, scenes

BATCH = 64
LEARNING_RATE = 2e-3
EMBEDDING_STD = 0.3  # CLIP's 0.02 lets a word's own meaning drown at first

# Place 0 is the middle, for an only object; the others are the relations' directions.
_PLACES = [(0, 0), *scenes.RELATIONS.values()]
_CHOICES = [list(scenes.COLOURS), list(scenes.SHAPES), list(scenes.RADII)]
_BACKGROUNDS = [None, *scenes.BACKGROUNDS]


def train(tokenizer: CLIPTokenizer, steps: int, seed: int) -> CLIPTextModel:
    """A text encoder trained for ``steps`` batches of training captions."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 1, ranks.rank()])
    captions = scenes.captions(rng)
    model = network.text_encoder(tokenizer)
    for name, weight in model.named_parameters():
        if name.endswith(("token_embedding.weight", "position_embedding.weight")):
            nn.init.normal_(weight, std=EMBEDDING_STD)
    widths = [len(choices) + 1 for _ in _PLACES for choices in _CHOICES] + [len(_BACKGROUNDS)]
    heads = nn.Linear(network.TEXT_WIDTH, sum(widths))
    optimizer = torch.optim.AdamW([*model.parameters(), *heads.parameters()], weight_decay=0.01)
    right = 0.0
    for step in range(steps):
        rate = LEARNING_RATE * min(1, (step + 1) / 100) * (1 - step / steps)
        optimizer.param_groups[0]["lr"] = rate
        some = [next(captions) for _ in range(BATCH // ranks.count())]
        tokens = network.tokenize(tokenizer, list(map(str, some)))
        answers = torch.tensor([_answers(caption) for caption in some])  # [BATCH, questions]
        # Every state after the end has seen the whole caption: ask one of them at random.
        ends = (tokens == tokenizer.eos_token_id).int().argmax(1)
        asked = ends + (torch.rand(len(some)) * (tokens.shape[1] - ends)).long()
        hidden = model(tokens).last_hidden_state[torch.arange(len(some)), asked]
        guesses = heads(hidden).split(widths, dim=1)
        loss = sum(functional.cross_entropy(g, a) for g, a in zip(guesses, answers.T, strict=True))
        optimizer.zero_grad()
        loss.backward()
        ranks.average_gradients(optimizer.param_groups[0]["params"])
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        told = torch.stack([guess.argmax(1) for guess in guesses], 1)
        right += 0.02 * ((told == answers).all(1).float().mean().item() - right)
        if ranks.rank() == 0 and step % 100 == 99:
            print(f"text encoder {step + 1}/{steps}: {right:.1%} wholly right", flush=True)
    return model


def _answers(caption: scenes.Caption) -> list[int]:
    """The classes of the colour, shape and size at each place (0: nothing), and the background."""
    answers = [0] * (len(_PLACES) * len(_CHOICES))
    right, down = scenes.RELATIONS.get(caption.relation or "", (0, 0))
    directions = [(right, down), (-right, -down)]
    for item, direction in zip(caption.items, directions, strict=False):
        first = _PLACES.index(direction) * len(_CHOICES)
        for question, (choices, choice) in enumerate(
            zip(_CHOICES, (item.colour, item.shape, item.size), strict=True)
        ):
            answers[first + question] = choices.index(choice) + 1
    return [*answers, _BACKGROUNDS.index(caption.background)]
