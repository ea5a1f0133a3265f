"""The Python face of the native core: one checked function or class for each kernel."""
