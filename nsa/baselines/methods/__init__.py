"""The methods of sparse attention: a short file each, and one tuple."""

import difflib

from nsa.baselines.method import Method
from nsa.baselines.methods.ada_snapkv import AdaSnapKV, AdaSnapKVSafeguard
from nsa.baselines.methods.block_sparse import BlockSparse, BlockSparseFrontier
from nsa.baselines.methods.dense import Dense
from nsa.baselines.methods.double_p import DoubleP
from nsa.baselines.methods.dual_chunk import DualChunk
from nsa.baselines.methods.flexprefill import FlexPrefill
from nsa.baselines.methods.flexprefill_released import FlexPrefillReleased
from nsa.baselines.methods.h2o import H2O
from nsa.baselines.methods.key_norm import KeyNorm
from nsa.baselines.methods.lm_infinite import LMInfinite
from nsa.baselines.methods.minference import MInference
from nsa.baselines.methods.oracle import OracleTopK, OracleTopP
from nsa.baselines.methods.pyramidkv import PyramidKV, PyramidKVKvpress
from nsa.baselines.methods.quest import Quest, QuestEval
from nsa.baselines.methods.qwen_1m import Qwen1M
from nsa.baselines.methods.random_tokens import RandomTokens
from nsa.baselines.methods.sink_window import SinkWindow
from nsa.baselines.methods.sketch_walk import SketchWalk, SketchWalkDamped
from nsa.baselines.methods.snapkv import SnapKV
from nsa.baselines.methods.sparq import SparQ
from nsa.baselines.methods.sparq_released import SparQReleased
from nsa.baselines.methods.streaming_llm import StreamingLLM
from nsa.baselines.methods.tova import Tova
from nsa.baselines.methods.twilight import Twilight
from nsa.baselines.methods.vattention import VAttention
from nsa.baselines.methods.vattention_released import VAttentionReleased
from nsa.baselines.methods.vertical_slash import VerticalSlash
from nsa.baselines.methods.vertical_slash_blocks import VerticalSlashBlocks

METHODS: tuple[type[Method], ...] = (
    # controls, which every comparison has
    Dense,
    OracleTopK,
    OracleTopP,
    RandomTokens,
    SinkWindow,
    # what they leave out is forgotten
    StreamingLLM,
    LMInfinite,
    H2O,
    Tova,
    KeyNorm,
    SnapKV,
    AdaSnapKV,
    AdaSnapKVSafeguard,
    PyramidKV,
    PyramidKVKvpress,
    # load less while decoding
    Quest,
    QuestEval,
    SparQ,
    SparQReleased,
    Twilight,
    DoubleP,
    VAttention,
    VAttentionReleased,
    # chosen in the prompt
    BlockSparse,
    BlockSparseFrontier,
    VerticalSlash,
    VerticalSlashBlocks,
    MInference,
    FlexPrefill,
    FlexPrefillReleased,
    SketchWalk,
    SketchWalkDamped,
    DualChunk,
    Qwen1M,
)


def method_named(name: str) -> type[Method]:
    """The method of that name.

    Raises:
        ValueError: there is none; the message has the nearest name.
    """
    by_name = {method.name: method for method in METHODS}
    if name not in by_name:
        near = difflib.get_close_matches(name, by_name, 1)
        hint = f": did you mean {near[0]!r}?" if near else f": one of {', '.join(by_name)}"
        raise ValueError(f"there is no method {name!r}{hint}")
    return by_name[name]
