"""Text as it is generated; no piece ever ends within a character."""

from __future__ import annotations

from fuserve import LLM, SamplingParams


def main() -> None:
    """Print an answer piece by piece."""
    llm = LLM("demo")
    params = SamplingParams(temperature=0.7, top_p=0.9, seed=1, max_tokens=64)
    for piece in llm.stream("Once upon a time", params):
        print(piece.text, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
