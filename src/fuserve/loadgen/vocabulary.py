"""What prompts are made of: the server's own token ids where it tells them, else words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import httpx2
import numpy as np

Prompt = str | list[int]
"""A text, or token ids."""

# Common words: nearly every tokenizer has each as one token, with the space before it.
TEXT = (
    "the of and to in is that it was for on are as with his they at be this from have or by one "
    "had not but what all were when we there can an your which their said if do will each about "
    "how up out them then she many some so these would other into has more her two like him see "
    "time could no make than first been its who now people my made over did down only way find "
    "use may water long little very after words called just where most know get through back "
    "much before go good new write our used me man too any day same right look think also around "
    "another came come work three word must because does part even place well such here take why "
    "things help put years different away again off went old number great tell men say small "
    "every found still between name should home big give air line set own under read last never "
    "us left end along while might next sound below saw something thought both few those always "
    "looked show large often together asked house world going want school important until form "
    "food keep children feet land side without boy once animals life enough took sometimes four "
    "head above kind began almost live page got earth need far hand high year mother light parts "
    "country father let night following picture being study second eyes soon times story boys "
    "since white days ever paper hard near sentence better best across during today others "
    "however sure means knew tried told young miles sun ways thing whole hear example heard "
    "several change answer room sea against top turned learn point city play toward five using "
    "himself usually"
)
WORDS = TEXT.split()

# Where servers tokenize: fuserve's and vLLM's, llama.cpp's own, llama-cpp-python's.
TOKENIZERS = (
    ("/tokenize", "prompt"),
    ("/tokenize", "content"),
    ("/extras/tokenize", "input"),
)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Token ids to draw prompts from; without them prompts are texts of as many words."""

    token_ids: tuple[int, ...] = ()

    def draw(self, rng: np.random.Generator, count: int) -> list[int]:
        """``count`` random tokens: ids, or indices of words."""
        pool = self.token_ids or range(len(WORDS))
        return [pool[i] for i in rng.integers(0, len(pool), count)]

    def prompt(self, tokens: list[int]) -> Prompt:
        """What is sent for these tokens."""
        return tokens if self.token_ids else " ".join(WORDS[token] for token in tokens)


async def find_vocabulary(http: httpx2.AsyncClient) -> Vocabulary:
    """Ask the server for the token ids of our words.

    Args:
        http: its base URL is the server's root, without ``/v1``.
    """
    text = " " + " ".join(WORDS)
    for path, field in TOKENIZERS:
        try:
            response = await http.post(path, json={field: text, "add_special_tokens": False})
            if response.status_code == httpx2.codes.OK:
                ids = _token_ids(response.json())
                if ids:
                    return Vocabulary(tuple(sorted(ids)))
        except (httpx2.TransportError, ValueError):
            continue
    return Vocabulary()


def _token_ids(body: Any) -> set[int]:
    # The first ids are left out: a beginning-of-text token may stand there.
    tokens = body.get("tokens", []) if isinstance(body, dict) else []
    return {token for token in tokens[1:] if isinstance(token, int)}
