"""How the tests compile: thousands of small programs run once or twice, so that XLA's efforts would take most of the time."""

import importlib.metadata


def xla_flags(devices: int) -> str:
    """Ask for fake devices, and for the older generator of CPU code where XLA has the choice: it takes half of the time."""
    older = "--xla_cpu_use_fusion_emitters=false" if importlib.metadata.version("jaxlib").startswith("0.10.") else ""
    return f"--xla_force_host_platform_device_count={devices} {older}".strip()
