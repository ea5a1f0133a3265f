"""A conversation of two turns, through the model's chat template."""

from __future__ import annotations

from fuserve import LLM, SamplingParams


def main() -> None:
    """Ask, and ask again with the answer in the conversation."""
    llm = LLM("demo")
    params = SamplingParams(temperature=0.0, max_tokens=64)
    messages = [{"role": "system", "content": "Answer in one sentence."}]
    for question in ("What is a river?", "Name one of them."):
        messages.append({"role": "user", "content": question})
        answer = llm.chat(messages, params)[0].outputs[0].text
        messages.append({"role": "assistant", "content": answer})
        print(f"> {question}\n{answer.strip()}\n")


if __name__ == "__main__":
    main()
