"""Bodies of requests: OpenAI's fields, and vLLM's beside them. Unknown ones are refused."""
