"""Keys as a sketch of few bits reads them back (Twilight, arXiv 2502.02770, section 4.2)."""

import torch
from torch import Tensor

from nsa import ops
from nsa.baselines.listed import lists_of
from nsa.baselines.method import State
from nsa.baselines.plan import View


def quantised(k: Tensor, bits: int) -> Tensor:
    """Keys (..., D) as read back from ``bits`` each, fp32: every key between its own least and greatest number."""
    k = k.float()
    if bits >= 16:
        return k
    low, high = k.amin(-1, keepdim=True), k.amax(-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(k.dtype).tiny)
    return ((k - low) / step).round() * step + low


def nucleus_of_sketch(view: View, state: State, among: Tensor, p: float) -> Tensor:
    """(B, G, S) bool: of the candidates ``among`` (B, G, S) the fewest that have the share ``p`` of a query head's
    attention, as 4-bit keys show it, joined over the heads of a KV head: by `nsa.ops.top_p_tokens`."""
    slots = among.shape[2]
    lengths = torch.full((len(among),), slots, dtype=torch.int32, device=among.device)
    pages = lists_of(among)[1]
    tokens = ops.top_p_tokens(view.q[:, 0], _sketch(view, state), lengths, p=p, pages=pages, scale=view.scale)
    chosen = torch.zeros(*among.shape[:2], slots + 1, dtype=torch.bool, device=among.device)
    return chosen.scatter_(-1, torch.where(tokens < 0, slots, tokens).long(), True)[..., :slots]


def forget_sketch(state: State) -> None:
    """Slots of the cache have moved: all keys are sketched anew."""
    state.rest["sketched"] = 0


def _sketch(view: View, state: State) -> ops.KeySketch:
    """Of the keys in the cache. Those of tokens since the last call are written; there may be room for more."""
    memory, done, slots = state.rest.get("sketch"), state.rest.get("sketched", 0), view.k.shape[1]
    if memory is None or memory["codes"].shape[1] < slots:
        batch, _, groups, width = view.k.shape
        room = slots if memory is None else 2 * slots  # doubled: a token costs O(1)
        codes = torch.zeros(batch, room, groups, width // 2, dtype=torch.uint8, device=view.k.device)
        memory, done = {"codes": codes, "ranges": codes.new_zeros(batch, room, groups, 2, dtype=torch.float32)}, 0
    for name, new in ops.sketch_keys(view.k[:, done:])._asdict().items():
        memory[name][:, done:slots] = new
    state.rest |= {"sketch": memory, "sketched": slots}
    return ops.KeySketch(**memory)
