"""The DeepSpeed configuration of a run. It sets all values that matter, since defaults change between releases.

Features that are off by default are not mentioned. One of them (comms_logger) is switched on by its mere presence:
every collective then waits for the GPU and appends to lists that are summed each time.
"""

from typing import Any

from nsa.config import Config
from nsa.parallel.grid import data_parallel_size


def micro_batches_per_step(config: Config, world_size: int) -> int:
    """Forward passes of one rank per optimizer step (gradient accumulation).

    Raises:
        ValueError: the global batch cannot be divided over the ranks, or ``world_size`` does not fit the layout.
    """
    training, replicas = config.training, data_parallel_size(config.parallel, world_size)
    per_pass = training.micro_batch_size * replicas
    if training.global_batch_size % per_pass:
        most = training.global_batch_size // training.micro_batch_size
        raise ValueError(
            f"training.global_batch_size ({training.global_batch_size}) must be a multiple of "
            f"training.micro_batch_size ({training.micro_batch_size}) x {replicas} data-parallel ranks: set "
            "training.micro_batch_size or training.global_batch_size, or use a number of data-parallel ranks that "
            f"divides {most}"
        )
    return training.global_batch_size // per_pass


def deepspeed_config(config: Config, world_size: int) -> dict[str, Any]:
    """The JSON that ``deepspeed.initialize`` gets and that the run folder has as deepspeed.json."""
    stage, bf16 = config.engine.zero_stage, config.engine.precision == "bf16"
    # Without ZeRO, DeepSpeed can accumulate gradients in the dtype of the weights only.
    accumulation = "bf16" if bf16 and stage == 0 else "fp32"
    micro_batch, passes = config.training.micro_batch_size, micro_batches_per_step(config, world_size)
    if config.parallel.pipeline > 1:  # the pipeline accumulates gradients itself and passes on the sum
        micro_batch, passes = micro_batch * passes, 1
    # Earlier releases do not pin memory by default, which makes the copies to and from the host slower.
    offload = {"offload_optimizer": {"device": "cpu", "pin_memory": True}} if config.engine.offload_optimizer else {}
    return {
        # DeepSpeed asserts that these three agree. It takes context-parallel ranks as data-parallel and counts a sample
        # on each of them, but not expert-parallel ranks.
        "train_batch_size": config.training.global_batch_size * config.parallel.context // config.parallel.expert,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": passes,
        # The default is 1.
        "gradient_clipping": config.optimizer.gradient_clipping,
        # Gradients are summed over ranks in fp32. The default is the dtype of the weights, also for grad_accum_dtype.
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": accumulation},
        # A step whose gradient is not finite is skipped (earlier releases applied it). Gradients are accumulated after
        # the backward pass (earlier releases did it in a hook of each parameter).
        "bf16": {"enabled": bf16, "check_grad_overflow": True, "immediate_grad_update": False},
        # We pass torch's optimizer (`nsa.training.optimizer`). By default ZeRO rejects optimizers that it does not
        # know, and, on the host, any but its own.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": stage,
            # Gradients of a bucket are copied to one buffer, and each rank keeps its shard of their sum. These are the
            # defaults; experts need them, and the plan assumes them.
            "contiguous_gradients": True,
            "reduce_scatter": True,
            # The default, except for ZeRO 3, which would reduce gradients on another stream.
            "overlap_comm": False,
            # A tenth of the defaults, which would need 3 GB of buffers in bf16.
            "reduce_bucket_size": 50_000_000,
            "allgather_bucket_size": 50_000_000,
            # These determine ZeRO 3's memory, and the plan assumes them; they are the defaults.
            "sub_group_size": 1_000_000_000,  # elements that are updated at a time
            "stage3_prefetch_bucket_size": 50_000_000,  # gathered ahead
            "stage3_param_persistence_threshold": 100_000,  # smaller weights are not sharded
            "stage3_max_live_parameters": 1_000_000_000,  # gathered at a time
            "stage3_max_reuse_distance": 1_000_000_000,  # weights that are used again sooner stay gathered
            **offload,
        },
        # On by default: it waits for the GPU before every forward pass and after every update.
        "timers": {"throughput": {"enabled": False}},
    }
