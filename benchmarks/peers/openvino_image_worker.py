"""OpenVINO in fp32, from an IR to which diffusers' module is converted once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from image_worker import TIMESTEP, Array, ImageWork, run

CONVERT = Path(__file__).with_name("openvino_convert.py")


class OpenVino:
    """A UNet or an autoencoder; ``--option site_packages=FOLDER`` says where OpenVINO is."""

    def __init__(self, work: ImageWork) -> None:
        site_packages = work.option("site_packages")
        ir = work.folder / f"openvino-{work.size}.xml"
        if not ir.exists():  # in a process of its own, whose memory does not count
            arguments = [site_packages, str(work.folder), work.part, str(work.size), str(ir)]
            subprocess.run([sys.executable, str(CONVERT), *arguments], check=True)
        sys.path.append(site_packages)  # behind this interpreter's own packages
        import openvino

        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": work.threads}
        self.model = openvino.Core().compile_model(ir, "CPU", settings)
        latents = work.latents().transpose(0, 3, 1, 2)
        self.inputs = [latents]
        if work.part == "unet":
            pair = np.concatenate([latents, latents])
            self.inputs = [pair, np.array(TIMESTEP, np.float32), work.text()]

    def run(self) -> Array:
        result = self.model(self.inputs)[0]
        return np.ascontiguousarray(result.transpose(0, 2, 3, 1))

    def details(self) -> dict[str, Any]:
        return {}


if __name__ == "__main__":
    run(OpenVino)
