"""Each scheduler takes the same steps as diffusers' class of that name, whatever the config."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from fuserve.diffusion.schedulers import SCHEDULER_NAMES, make_scheduler
from fuserve.errors import InvalidRequestError, UnsupportedModelError

SD15: dict[str, Any] = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
SD21 = {**SD15, "_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
SDXL = {
    **SD15,
    "_class_name": "EulerDiscreteScheduler",
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}
SD_TURBO = {**SDXL, "prediction_type": "epsilon", "timestep_spacing": "trailing"}
SDXL_TURBO = {**SD_TURBO, "_class_name": "EulerAncestralDiscreteScheduler"}
LCM_DREAMSHAPER = {
    **SD15,
    "_class_name": "LCMScheduler",
    "original_inference_steps": 50,
    "set_alpha_to_one": True,
    "timestep_scaling": 10.0,
    "timestep_spacing": "leading",
    "rescale_betas_zero_snr": False,
}
ZERO_SNR = {
    **SD21,
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}
PIXELS = {"_class_name": "DDIMScheduler", "clip_sample": True, "beta_schedule": "squaredcos_cap_v2"}

DPM = {**SD15, "_class_name": "DPMSolverMultistepScheduler"}
UNIPC = {**SD15, "_class_name": "UniPCMultistepScheduler"}
EULER = SDXL
ANCESTRAL = {**SDXL, "_class_name": "EulerAncestralDiscreteScheduler"}
KARRAS = {"use_karras_sigmas": True}

CONFIGS: dict[str, dict[str, Any]] = {
    "sd15": SD15,
    "sd15-linspace": {**SD15, "timestep_spacing": "linspace"},
    "sd15-trailing": {**SD15, "timestep_spacing": "trailing"},
    "pndm-v": {**SD15, "prediction_type": "v_prediction", "set_alpha_to_one": True},
    "sd21": SD21,
    "ddim-epsilon": {**SD15, "_class_name": "DDIMScheduler"},
    "ddim-linspace-sample": {**SD21, "timestep_spacing": "linspace", "prediction_type": "sample"},
    "ddim-zero-snr": ZERO_SNR,
    "ddim-pixels": PIXELS,
    "ddim-clip-range": {**PIXELS, "clip_sample_range": 2.5, "set_alpha_to_one": True},
    "ddim-trained-betas": {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": 200,
        "trained_betas": [0.001 * (i + 1) for i in range(200)],
    },
    "sdxl": SDXL,
    "sd-turbo": SD_TURBO,
    "sdxl-turbo": SDXL_TURBO,
    "euler-linspace": {**EULER, "timestep_spacing": "linspace"},
    "euler-karras": {**EULER, **KARRAS},
    "euler-karras-bounds": {**EULER, **KARRAS, "sigma_min": 0.1, "sigma_max": 12.0},
    "euler-exponential": {**EULER, "use_exponential_sigmas": True},
    "euler-log-linear": {**EULER, "interpolation_type": "log_linear"},
    "euler-v-sigma-min": {
        **EULER,
        "prediction_type": "v_prediction",
        "final_sigmas_type": "sigma_min",
    },
    "euler-sample": {**EULER, "prediction_type": "sample"},
    "euler-zero-snr": {**EULER, **ZERO_SNR, "_class_name": "EulerDiscreteScheduler"},
    "euler-a": ANCESTRAL,
    "euler-a-v": {**ANCESTRAL, "prediction_type": "v_prediction", "timestep_spacing": "linspace"},
    "dpm": DPM,
    "dpm-karras": {**DPM, **KARRAS},
    "dpm-exponential": {**DPM, "use_exponential_sigmas": True},
    "dpm-leading": {**DPM, "timestep_spacing": "leading"},
    "dpm-trailing-euler-at-final": {
        **DPM,
        "timestep_spacing": "trailing",
        "euler_at_final": True,
        "lower_order_final": False,
    },
    "dpm-not-lowered": {**DPM, "lower_order_final": False, "final_sigmas_type": "sigma_min"},
    "dpm-heun": {**DPM, "solver_type": "heun", "final_sigmas_type": "sigma_min"},
    "dpm-first": {**DPM, "solver_order": 1},
    "dpm-third": {**DPM, "solver_order": 3},
    "dpm-v-sigma-min": {**DPM, "prediction_type": "v_prediction", "final_sigmas_type": "sigma_min"},
    "dpm-sample": {**DPM, "prediction_type": "sample"},
    "dpm-cosine": {
        **DPM,
        "beta_schedule": "squaredcos_cap_v2",
        "lambda_min_clipped": -5.1,
    },
    "dpm-cosine-karras": {**DPM, **KARRAS, "beta_schedule": "squaredcos_cap_v2"},
    "dpm-zero-snr": {**ZERO_SNR, "_class_name": "DPMSolverMultistepScheduler"},
    "dpm-sde": {**DPM, "algorithm_type": "sde-dpmsolver++"},
    "dpm-sde-karras": {**DPM, **KARRAS, "algorithm_type": "sde-dpmsolver++"},
    "dpm-sde-heun": {**DPM, "algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
    "unipc": UNIPC,
    "unipc-karras": {**UNIPC, **KARRAS},
    "unipc-exponential": {**UNIPC, "use_exponential_sigmas": True},
    "unipc-third": {**UNIPC, "solver_order": 3, "timestep_spacing": "leading"},
    "unipc-bh1": {**UNIPC, "solver_type": "bh1", "final_sigmas_type": "sigma_min"},
    "unipc-v": {**UNIPC, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    "unipc-first-uncorrected": {**UNIPC, "disable_corrector": [0, 2]},
    "unipc-zero-snr": {**ZERO_SNR, "_class_name": "UniPCMultistepScheduler"},
    "lcm": LCM_DREAMSHAPER,
    "lcm-clip-v": {
        "_class_name": "LCMScheduler",
        "clip_sample": True,
        "prediction_type": "v_prediction",
        "original_inference_steps": 100,
    },
}
STEPS = [1, 2, 3, 4, 7, 14, 15, 27]
LOOSE = {"unipc-third": 1e-4, "euler-zero-snr": 2e-4}
"""Where diffusers itself loses bits: float32 equations, and differences to a sigma of 4096."""


def oracle(config: dict[str, Any]) -> Any:
    cls = getattr(diffusers, config["_class_name"])
    accepted = inspect.signature(cls.__init__).parameters
    return cls(**{name: value for name, value in config.items() if name in accepted})


def check_trajectory(name: str, steps: int, start: int = 0) -> None:
    """The same predictions and noise through both; latents and timesteps agree."""
    config = CONFIGS[name]
    theirs = oracle(config)
    theirs.set_timesteps(steps)
    ours = make_scheduler(config, steps)
    np.testing.assert_allclose(ours.timesteps, theirs.timesteps.numpy(), rtol=1e-6, atol=1e-4)
    assert ours.init_noise_sigma == pytest.approx(float(theirs.init_noise_sigma), rel=1e-6)
    if hasattr(theirs, "set_begin_index"):
        theirs.set_begin_index(start)

    random = np.random.default_rng(steps)
    shape = (1, 3, 5, 4)
    clean, noise = random.standard_normal((2, *shape), np.float32)
    timesteps = theirs.timesteps[start:]
    noisy = theirs.add_noise(torch.tensor(clean), torch.tensor(noise), timesteps[:1])
    np.testing.assert_allclose(ours.add_noise(clean, noise, start), noisy, rtol=2e-4, atol=1e-5)
    sample = noisy.numpy() if start else noise * np.float32(ours.init_noise_sigma)
    wanted = torch.tensor(sample)
    generator = torch.Generator().manual_seed(1)
    drawn = torch.Generator().manual_seed(1)
    for index, timestep in enumerate(timesteps, start):
        scaled = theirs.scale_model_input(wanted, timestep)
        np.testing.assert_allclose(ours.scale_input(sample, index), scaled, rtol=1e-3, atol=1e-3)
        prediction = random.standard_normal(shape, np.float32)
        takes_generator = "generator" in inspect.signature(theirs.step).parameters
        keywords = {"generator": generator} if takes_generator else {}
        before = float(wanted.abs().max())
        wanted = theirs.step(torch.tensor(prediction), timestep, wanted, **keywords).prev_sample
        fresh = torch.randn(shape, generator=drawn).numpy() if ours.draws_noise(index) else None
        sample = ours.step(sample, prediction, index, fresh).sample
        assert sample.dtype == np.float32
        allowed = LOOSE.get(name, 2e-5) * float(wanted.abs().max()) + 3e-7 * before
        assert float(np.abs(sample - wanted.numpy()).max()) <= allowed, (index, timestep)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_step_is_that_of_diffusers(name: str, steps: int) -> None:
    check_trajectory(name, steps)


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl", "euler-a", "dpm-karras", "unipc", "lcm"])
def test_fifty_steps_are_those_of_diffusers(name: str) -> None:
    check_trajectory(name, 50)


@pytest.mark.parametrize("start", [1, 4, 9, 19])
@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl", "euler-a", "dpm-karras", "unipc", "lcm"])
def test_a_run_may_begin_later(name: str, start: int) -> None:
    check_trajectory(name, 20, start)


@pytest.mark.parametrize("name", SCHEDULER_NAMES)
def test_a_config_serves_every_scheduler(name: str) -> None:
    for config in (SD15, SD21, SDXL, LCM_DREAMSHAPER):
        assert len(make_scheduler(config, 8, name).timesteps) in (8, 9)


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({**SD15, "_class_name": "HeunDiscreteScheduler"}, "_class_name"),
        ({**SD15, "beta_schedule": "sigmoid"}, "beta_schedule"),
        ({**SD15, "skip_prk_steps": False}, "skip_prk_steps"),
        ({**SD21, "prediction_type": "flow"}, "prediction_type"),
        ({**SD21, "thresholding": True}, "thresholding"),
        ({**SD21, "steps_offset": "one"}, "steps_offset"),
        ({**SDXL, "use_beta_sigmas": True}, "use_beta_sigmas"),
        ({**SDXL, "timestep_type": "continuous"}, "timestep_type"),
        ({**SDXL, **KARRAS, "use_exponential_sigmas": True}, "use_karras_sigmas"),
        ({**DPM, "algorithm_type": "dpmsolver"}, "algorithm_type"),
        ({**DPM, "solver_order": 4}, "solver_order"),
        ({**DPM, "use_lu_lambdas": True}, "use_lu_lambdas"),
        ({**UNIPC, "predict_x0": False}, "predict_x0"),
        ({**UNIPC, "use_flow_sigmas": True}, "use_flow_sigmas"),
    ],
)
def test_what_is_not_supported_is_named(config: dict[str, Any], field: str) -> None:
    with pytest.raises(UnsupportedModelError, match=field):
        make_scheduler(config, 10)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_a_number_of_steps_out_of_range_is_refused(steps: int) -> None:
    with pytest.raises(InvalidRequestError, match="steps"):
        make_scheduler(SD21, steps)


def test_an_offset_beyond_the_last_timestep_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="steps_offset of 1 begins beyond"):
        make_scheduler({**SD15, "timestep_spacing": "leading", "steps_offset": 1}, 1000, "ddim")


def test_more_steps_than_a_distillation_had_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="steps=51"):
        make_scheduler(LCM_DREAMSHAPER, 51)


def test_an_unknown_name_lists_those_that_are_known() -> None:
    with pytest.raises(InvalidRequestError, match=r"dpm\+\+2m-karras"):
        make_scheduler(SD15, 20, "heun")
