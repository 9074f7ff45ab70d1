"""The list of all families that can be imported."""

from nsa.importing.deepseek import DEEPSEEK_V2, DEEPSEEK_V3, DEEPSEEK_V32
from nsa.importing.family import Family
from nsa.importing.llama import LLAMA
from nsa.importing.mistral import MISTRAL
from nsa.importing.own import OWN
from nsa.importing.qwen2 import QWEN2
from nsa.importing.qwen3 import QWEN3

FAMILIES: tuple[Family, ...] = (
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    DEEPSEEK_V32,
    OWN,
)
