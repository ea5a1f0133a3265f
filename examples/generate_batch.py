"""Several prompts together: they share every step, and each answer is the same as alone."""

from __future__ import annotations

from fuserve import LLM, SamplingParams

PROMPTS = [
    "The capital of France is",
    "Water boils at",
    "A haiku about rain:",
    "The first three prime numbers are",
]


def main() -> None:
    """Generate for all prompts at once."""
    llm = LLM("demo")
    params = SamplingParams(temperature=0.0, max_tokens=32)
    for output in llm.generate(PROMPTS, params):
        print(f"{output.prompt!r}\n  {output.outputs[0].text.strip()!r}\n")


if __name__ == "__main__":
    main()
