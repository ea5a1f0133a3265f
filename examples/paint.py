"""A picture and two variations of it, saved with what made them."""

from __future__ import annotations

import sys
from dataclasses import replace

from fuserve import ImageParams, TextToImage


def main() -> None:
    """Paint with the model named on the command line, then start again from the picture."""
    with TextToImage(sys.argv[1] if len(sys.argv) > 1 else "demo-diffusion") as painter:
        params = ImageParams(seed=8, guidance_scale=3.0)
        (image,) = painter.generate("a red circle above a blue square", params)
        image.save("circle.png")
        start = image.pixels / 255.0
        again = replace(params, init_image=start, strength=0.6, seed=9, num_images=2)
        for variation in painter.generate("a green circle above a blue square", again):
            variation.save(f"circle-{variation.seed}.png")


if __name__ == "__main__":
    main()
