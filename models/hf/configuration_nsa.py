"""The configuration of an exported decoder, as `transformers` reads it from config.json."""

from transformers import PreTrainedConfig


class NSAConfig(PreTrainedConfig):
    """Shape of the decoder. Lengths are in tokens.

    Args:
        vocab_size, hidden_size, intermediate_size: widths of the embedding, the residual stream and the SwiGLU.
        num_hidden_layers, num_attention_heads, num_key_value_heads: the last divides the one before it.
        head_dim: of queries and keys. v_head_dim: of values; None: head_dim.
        qkv_bias, qk_norm: of all layers but those of NSA: biases of the three projections; an RMSNorm of query and key
            heads.
        projection: of dense and DSA layers: "gqa", or "mla" for multi-head latent attention, of the widths that follow.
        q_lora_rank, kv_lora_rank: of the latents of queries (None: there is none), and of keys and values.
        qk_nope_head_dim, qk_rope_head_dim: of a query or key: dims that are not rotated, and those that are.
        rope_interleave: whether their pairs are (2i, 2i + 1).
        attention_kinds: "dense", "nsa", "dsa", "csa" or "entmax" for each layer.
        compress_length, compress_stride: tokens in a compression block (l) and between two of them (d).
        compress_hidden: hidden width of the compression MLP; None: the head's.
        key_compression: of NSA layers: "mlp", or "pooled": keys are a mean of the block with learned weights.
        nsa_phase: "sparse"; "warm-up": the selection was being taught, and queries attend to all tokens.
        block_size, num_blocks: tokens in a selection block (l'), blocks that a query selects (n).
        num_initial, num_local: blocks that are always among them: the first, the most recent (the query's own too).
        window: tokens that the sliding window sees, the query's own included (w).
        index_topk: tokens that a query of a DSA layer attends to (k); among them are always index_num_initial at the
            start, and index_num_local of the most recent (the query's own too).
        index_heads, index_head_dim: of the indexer that chooses them.
        index_rotary_dims, index_rotary_place, index_rotary_pairs: how many dims of an index head are rotated; whether
            these are its "first" or "last"; whether their pairs are "half-split", (i, i + half), or "interleaved",
            (2i, 2i + 1).
        index_fp8: whether index queries and keys are rounded to fp8 (e4m3), with a scale for each head and key.
        index_phase: "sparse"; "warm-up": the indexer was being trained, and queries attend to all tokens.
        index_share_layers, index_share_from: DSA layers in a group, of which the first has the indexer and the others
            attend to the tokens that it chooses; DSA layers before the first group, each with an indexer of its own.
        csa_ratio, csa_overlap: of CSA layers: tokens per entry (m); whether an entry is made of the m tokens before
            them, too.
        csa_topk: entries that a query attends to (k); None: all, without an indexer.
        csa_heavy_ratio: tokens per entry in every second CSA layer, which has no overlap and attends to all its
            entries; None: all are alike.
        csa_window: tokens that a query sees as they are, its own included.
        csa_rotary_dims: dims of a head that are rotated, the last ones; None: all.
        csa_q_lora_rank: of the latent of queries; None: there is none.
        csa_index_heads, csa_index_head_dim, csa_index_rotary_dims: of the indexer that chooses entries.
        csa_phase: "sparse"; "warm-up": the indexer was being trained, and queries attend to all entries.
        entmax_alpha, entmax_scaling: of entmax layers: 2 is sparsemax; the factor of the scores, "none", "asentmax" or
            "ssmax".
        entmax_nope_heads: their last query heads, which know no positions; entmax_position: of the others, "rotary" or
            "alibi".
        num_experts, num_experts_per_token: routed experts of a layer, and how many of them compute a token; 0: none.
        num_shared_experts, expert_size: experts that compute every token, and the width of an expert.
        first_dense: layers at the start that have a SwiGLU of intermediate_size instead.
        max_position_embeddings: rotary range, extension included. original_max_position: range of the training.
        rotary_base, yarn_factor, yarn_beta_fast, yarn_beta_slow: rotary embedding and its YaRN length extension.
        rotary_scaling: frequencies of the training, if they are scaled: `rope_parameters` of type llama3 or yarn.
    """

    model_type = "nsa"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012 - as transformers declares it

    def __init__(
        self,
        vocab_size: int = 4096,
        hidden_size: int = 256,
        intermediate_size: int = 768,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 4,
        num_key_value_heads: int = 1,
        head_dim: int = 64,
        v_head_dim: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        projection: str = "gqa",
        q_lora_rank: int | None = None,
        kv_lora_rank: int | None = None,
        qk_nope_head_dim: int | None = None,
        qk_rope_head_dim: int | None = None,
        rope_interleave: bool = True,
        attention_kinds: list[str] | None = None,
        compress_length: int = 32,
        compress_stride: int = 16,
        compress_hidden: int | None = None,
        key_compression: str = "mlp",
        nsa_phase: str = "sparse",
        block_size: int = 64,
        num_blocks: int = 16,
        num_initial: int = 1,
        num_local: int = 2,
        window: int = 512,
        index_topk: int = 2048,
        index_num_initial: int = 0,
        index_num_local: int = 0,
        index_heads: int = 64,
        index_head_dim: int = 128,
        index_rotary_dims: int = 64,
        index_rotary_place: str = "first",
        index_rotary_pairs: str = "half-split",
        index_fp8: bool = False,
        index_phase: str = "sparse",
        index_share_layers: int = 1,
        index_share_from: int = 0,
        csa_ratio: int = 4,
        csa_overlap: bool = True,
        csa_topk: int | None = 512,
        csa_heavy_ratio: int | None = None,
        csa_window: int = 128,
        csa_rotary_dims: int | None = None,
        csa_q_lora_rank: int | None = None,
        csa_index_heads: int = 64,
        csa_index_head_dim: int = 128,
        csa_index_rotary_dims: int = 64,
        csa_phase: str = "sparse",
        entmax_alpha: float = 1.5,
        entmax_scaling: str = "asentmax",
        entmax_nope_heads: int = 0,
        entmax_position: str = "rotary",
        num_experts: int = 0,
        num_experts_per_token: int = 0,
        num_shared_experts: int = 0,
        expert_size: int = 0,
        first_dense: int = 0,
        max_position_embeddings: int = 4096,
        original_max_position: int | None = None,
        rotary_base: float = 10000.0,
        yarn_factor: float = 1.0,
        yarn_beta_fast: float = 32.0,
        yarn_beta_slow: float = 1.0,
        rotary_scaling: dict | None = None,
        rms_norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool = True,
        use_cache: bool = True,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.v_head_dim = v_head_dim or head_dim
        self.qkv_bias = qkv_bias
        self.qk_norm = qk_norm
        self.projection = projection
        self.q_lora_rank = q_lora_rank
        self.kv_lora_rank = kv_lora_rank
        self.qk_nope_head_dim = qk_nope_head_dim
        self.qk_rope_head_dim = qk_rope_head_dim
        self.rope_interleave = rope_interleave
        self.attention_kinds = attention_kinds or ["nsa"] * num_hidden_layers
        self.compress_length = compress_length
        self.compress_stride = compress_stride
        self.compress_hidden = compress_hidden
        self.key_compression = key_compression
        self.nsa_phase = nsa_phase
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.num_initial = num_initial
        self.num_local = num_local
        self.window = window
        self.index_topk = index_topk
        self.index_num_initial = index_num_initial
        self.index_num_local = index_num_local
        self.index_heads = index_heads
        self.index_head_dim = index_head_dim
        self.index_rotary_dims = index_rotary_dims
        self.index_rotary_place = index_rotary_place
        self.index_rotary_pairs = index_rotary_pairs
        self.index_fp8 = index_fp8
        self.index_phase = index_phase
        self.index_share_layers = index_share_layers
        self.index_share_from = index_share_from
        self.csa_ratio = csa_ratio
        self.csa_overlap = csa_overlap
        self.csa_topk = csa_topk
        self.csa_heavy_ratio = csa_heavy_ratio
        self.csa_window = csa_window
        self.csa_rotary_dims = csa_rotary_dims
        self.csa_q_lora_rank = csa_q_lora_rank
        self.csa_index_heads = csa_index_heads
        self.csa_index_head_dim = csa_index_head_dim
        self.csa_index_rotary_dims = csa_index_rotary_dims
        self.csa_phase = csa_phase
        self.entmax_alpha = entmax_alpha
        self.entmax_scaling = entmax_scaling
        self.entmax_nope_heads = entmax_nope_heads
        self.entmax_position = entmax_position
        self.num_experts = num_experts
        self.num_experts_per_token = num_experts_per_token
        self.num_shared_experts = num_shared_experts
        self.expert_size = expert_size
        self.first_dense = first_dense
        self.max_position_embeddings = max_position_embeddings
        self.original_max_position = original_max_position or max_position_embeddings
        self.rotary_base = rotary_base
        self.yarn_factor = yarn_factor
        self.yarn_beta_fast = yarn_beta_fast
        self.yarn_beta_slow = yarn_beta_slow
        self.rotary_scaling = rotary_scaling
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.tie_word_embeddings = tie_word_embeddings
        self.use_cache = use_cache
        super().__init__(**kwargs)

    def indexer_layer(self, number: int) -> int:
        """The layer whose indexer chooses the tokens of DSA layer ``number``: this one, or the first of its group."""
        layers = [i for i, kind in enumerate(self.attention_kinds) if kind == "dsa"]
        place = layers.index(number)
        if place >= self.index_share_from:
            place -= (place - self.index_share_from) % self.index_share_layers
        return layers[place]
