"""How the tests compile: thousands of small programs run once or twice, so that XLA's efforts would take most of the time."""

import importlib.metadata

# Newer ones have one generator of CPU code, and no such option.
_CHOICE = importlib.metadata.version("jaxlib").startswith("0.10.")
# A program that a test looks at is compiled with these options, and under the fixture `full_compiles`: then its text, its
# memory and its counts are those that a user gets. Level 0 is of the machine code alone, which nobody runs.
AS_FOR_USERS = {"xla_backend_optimization_level": 0, **({"xla_cpu_use_fusion_emitters": True} if _CHOICE else {})}


def xla_flags(devices: int) -> str:
    """Ask for fake devices, and for machine code that is made with little effort.

    The older generator of CPU code, where XLA has the choice, takes half of the time; a small program that is cut up, to be
    compiled by several threads, takes an eighth more.
    """
    older = "--xla_cpu_use_fusion_emitters=false" if _CHOICE else ""
    return f"--xla_force_host_platform_device_count={devices} --xla_cpu_parallel_codegen_split_count=1 {older}".strip()
