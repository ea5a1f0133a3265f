"""``/v1/images``: pictures from prompts, in OpenAI's shapes."""
