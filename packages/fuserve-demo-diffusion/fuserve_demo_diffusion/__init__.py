"""The folder ``model`` beside this file is a Stable Diffusion pipeline of coloured shapes."""
