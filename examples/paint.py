"""A picture and two variations of it, saved with what made them."""

from __future__ import annotations

import sys

from fuserve import ImageParams, TextToImage


def main() -> None:
    """Paint with the model of the command line, then start again from the picture."""
    with TextToImage(sys.argv[1]) as painter:
        (image,) = painter.generate("a red circle above a blue square", ImageParams(seed=7))
        image.save("circle.png")
        again = ImageParams(init_image=image.pixels / 255.0, strength=0.6, seed=8, num_images=2)
        for variation in painter.generate("a green circle above a blue square", again):
            variation.save(f"circle-{variation.seed}.png")


if __name__ == "__main__":
    main()
