"""The DeepSpeed configuration of a run, generated whole: no default that matters is left to the release."""

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
    # Its optimizer is ours, torch's (`nsa.training.optimizer`): so DeepSpeed is told not to ask for its own.
    offload = {"offload_optimizer": {"device": "cpu", "pin_memory": True}} if config.engine.offload_optimizer else {}
    return {
        # Context-parallel ranks are data-parallel to DeepSpeed: it counts a sample on each. Expert-parallel are not.
        "train_batch_size": config.training.global_batch_size * config.parallel.context // config.parallel.expert,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": passes,
        "gradient_clipping": config.optimizer.gradient_clipping,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": accumulation},
        "bf16": {"enabled": bf16, "check_grad_overflow": True, "immediate_grad_update": False},
        "fp16": {"enabled": False},
        "torch_autocast": {"enabled": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": stage,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "overlap_comm": False,
            "reduce_bucket_size": 50_000_000,
            "allgather_bucket_size": 50_000_000,
            "allgather_partitions": True,
            "round_robin_gradients": False,
            "ignore_unused_parameters": True,
            "sub_group_size": 1_000_000_000,
            "stage3_prefetch_bucket_size": 50_000_000,
            "stage3_param_persistence_threshold": 100_000,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 1_000_000_000,
            **offload,
        },
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
        "memory_breakdown": False,
        "dump_state": False,
        "tensorboard": {"enabled": False},
        "csv_monitor": {"enabled": False},
        "wandb": {"enabled": False},
        "comms_logger": {"enabled": False},
        "flops_profiler": {"enabled": False},
    }
