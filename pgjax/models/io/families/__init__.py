"""The families of models: how each writes its options in config.json and names its tensors, both ways."""

from __future__ import annotations

from collections.abc import Mapping

from pgjax.models.io.families.cohere import COHERE2, GLM4, STABLELM
from pgjax.models.io.families.falcon import FALCON
from pgjax.models.io.families.family import Family
from pgjax.models.io.families.gemma import GEMMA, GEMMA2, GEMMA3
from pgjax.models.io.families.gpt import GPT2, GPT_NEOX
from pgjax.models.io.families.llama import GRANITE, LLAMA, MISTRAL, QWEN2, QWEN3, SMOLLM3
from pgjax.models.io.families.moe import MIXTRAL, QWEN3_MOE
from pgjax.models.io.families.olmo import OLMO2, OLMO3
from pgjax.models.io.families.phi import PHI3

FAMILIES: Mapping[str, Family] = {  # by model_type
    "cohere2": COHERE2,
    "falcon": FALCON,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "glm4": GLM4,
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
    "granite": GRANITE,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "mixtral": MIXTRAL,
    "olmo2": OLMO2,
    "olmo3": OLMO3,
    "phi3": PHI3,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
    "smollm3": SMOLLM3,
    "stablelm": STABLELM,
}
