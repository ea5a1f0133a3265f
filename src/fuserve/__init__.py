"""fuserve serves large language models and paints with diffusion models.

>>> from fuserve import LLM, SamplingParams
>>> with LLM("demo") as llm:
...     print(llm.chat([{"role": "user", "content": "Hello!"}])[0].outputs[0].text)

Names are imported when first used, so ``import fuserve`` itself loads neither numpy nor the
native core.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from fuserve.errors import (
    CapacityError,
    CheckpointError,
    FuserveError,
    InvalidRequestError,
    MissingExtraError,
    ModelNotFoundError,
    RequestFailedError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from fuserve.diffusion.generated_image import GeneratedImage
    from fuserve.diffusion.image_file import load_image, load_mask
    from fuserve.diffusion.image_params import ImageParams
    from fuserve.engine.completion_stream import CompletionStream
    from fuserve.engine.guided import GuidedDecoding
    from fuserve.engine.outputs import CompletionOutput, Logprob, Piece, RequestOutput
    from fuserve.engine.sampling_params import SamplingParams
    from fuserve.llm import LLM
    from fuserve.text_to_image import ImageProgress, TextToImage

    __version__: str

__all__ = [
    "LLM",
    "CapacityError",
    "CheckpointError",
    "CompletionOutput",
    "CompletionStream",
    "FuserveError",
    "GeneratedImage",
    "GuidedDecoding",
    "ImageParams",
    "ImageProgress",
    "InvalidRequestError",
    "Logprob",
    "MissingExtraError",
    "ModelNotFoundError",
    "Piece",
    "RequestFailedError",
    "RequestOutput",
    "SamplingParams",
    "TextToImage",
    "UnsupportedModelError",
    "__version__",
    "load_image",
    "load_mask",
]

_LAZY = {
    "LLM": "fuserve.llm",
    "TextToImage": "fuserve.text_to_image",
    "ImageProgress": "fuserve.text_to_image",
    "ImageParams": "fuserve.diffusion.image_params",
    "GeneratedImage": "fuserve.diffusion.generated_image",
    "load_image": "fuserve.diffusion.image_file",
    "load_mask": "fuserve.diffusion.image_file",
    "CompletionStream": "fuserve.engine.completion_stream",
    "SamplingParams": "fuserve.engine.sampling_params",
    "GuidedDecoding": "fuserve.engine.guided",
    "CompletionOutput": "fuserve.engine.outputs",
    "Logprob": "fuserve.engine.outputs",
    "Piece": "fuserve.engine.outputs",
    "RequestOutput": "fuserve.engine.outputs",
}


if not TYPE_CHECKING:  # a type checker shall see the names above, and no others

    def __getattr__(name: str) -> object:
        if name == "__version__":
            from importlib.metadata import version

            value: object = version("fuserve")
        elif name in _LAZY:
            value = getattr(import_module(_LAZY[name]), name)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
