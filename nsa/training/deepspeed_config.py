"""The DeepSpeed configuration of a run, generated whole: no default that matters is left to the release.

What DeepSpeed leaves off by itself is not named: of one feature (comms_logger) the name alone switches it on, and every
collective then waits for the GPU and appends to lists that it sums anew each time.
"""

from typing import Any

from nsa.config import Config
from nsa.parallel.grid import data_parallel_size


def micro_batches_per_step(config: Config, world_size: int) -> int:
    """Forward passes of one rank per optimizer step (gradient accumulation).

    Raises:
        ValueError: the global batch cannot be divided over the ranks, or the ranks not over the parallel layout.
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
    """The JSON handed to ``deepspeed.initialize`` and saved in the run folder as deepspeed.json."""
    stage, bf16 = config.engine.zero_stage, config.engine.precision == "bf16"
    # Without ZeRO DeepSpeed accumulates gradients in the dtype of the weights only.
    accumulation = "bf16" if bf16 and stage == 0 else "fp32"
    micro_batch, passes = config.training.micro_batch_size, micro_batches_per_step(config, world_size)
    if config.parallel.pipeline > 1:  # which accumulates by itself and hands the sum over
        micro_batch, passes = micro_batch * passes, 1
    # In earlier releases not pinned by default, which makes the copies to and from the host slower.
    offload = {"offload_optimizer": {"device": "cpu", "pin_memory": True}} if config.engine.offload_optimizer else {}
    return {
        # DeepSpeed asserts that these three agree. Context-parallel ranks are data-parallel to it: it counts a sample
        # on each. Expert-parallel are not.
        "train_batch_size": config.training.global_batch_size * config.parallel.context // config.parallel.expert,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": passes,
        # The default is 1.
        "gradient_clipping": config.optimizer.gradient_clipping,
        # Ranks add up gradients in fp32, whatever the weights are. The default is the dtype of the weights, as for:
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": accumulation},
        # A step whose gradient is not finite is refused: earlier releases took it. Gradients are added up after the
        # backward pass: earlier releases did so in a hook of each parameter.
        "bf16": {"enabled": bf16, "check_grad_overflow": True, "immediate_grad_update": False},
        # The optimizer is ours, torch's (`nsa.training.optimizer`): by default ZeRO refuses any that it does not know,
        # and on the host any that is not its own.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": stage,
            # Gradients are gathered in one buffer of a bucket, and each rank keeps its part of their sum. The default,
            # that experts need and that the plan counts with.
            "contiguous_gradients": True,
            "reduce_scatter": True,
            # The default but for ZeRO 3, which would sum gradients on a stream of its own.
            "overlap_comm": False,
            # A tenth of the defaults, which would be 3 GB of buffers in bf16.
            "reduce_bucket_size": 50_000_000,
            "allgather_bucket_size": 50_000_000,
            # ZeRO 3's memory, which the plan counts with; these are the defaults.
            "sub_group_size": 1_000_000_000,  # elements that are updated at a time
            "stage3_prefetch_bucket_size": 50_000_000,  # gathered ahead
            "stage3_param_persistence_threshold": 100_000,  # smaller weights are not sharded
            "stage3_max_live_parameters": 1_000_000_000,  # gathered at a time
            "stage3_max_reuse_distance": 1_000_000_000,  # what is used again sooner stays gathered
            **offload,
        },
        # On by default: it waits for the GPU before every forward pass and after every update.
        "timers": {"throughput": {"enabled": False}},
    }
