"""What is special about processes that hold a part of the weights each: FSDP and DeepSpeed."""

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from .recipe import TrainingSettings


def is_sharded(accelerator: Accelerator) -> bool:
    """Tell whether weights or moments are divided among the processes."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def prepare_sharding(accelerator: Accelerator, settings: TrainingSettings) -> None:
    """Hand the recipe's numbers to DeepSpeed, which asks for them.

    Raises:
        ValueError: If an average of the weights is wanted, which no process could keep.
    """
    if is_sharded(accelerator) and settings.ema_decay > 0:
        raise ValueError(
            f"`training.ema_decay` must be 0 with {accelerator.distributed_type.value}, got "
            f"{settings.ema_decay}: no process has all weights to average."
        )
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": settings.batch_size,
            "gradient_accumulation_steps": settings.gradient_accumulation_steps,
            "gradient_clipping": settings.gradient_clip_norm,
        }


def check_shares(accelerator: Accelerator, num_images: int) -> None:
    """Reject a validation split of which processes would evaluate different numbers of images.

    Each forward pass gathers weights from all processes, and would wait for ever for one that has
    no image left.

    Raises:
        ValueError: If the images do not divide evenly.
    """
    if is_sharded(accelerator) and num_images % accelerator.num_processes:
        raise ValueError(
            f"The validation split has {num_images} images; with "
            f"{accelerator.distributed_type.value} their number must be a multiple of the "
            f"{accelerator.num_processes} processes."
        )


def gather_weights(accelerator: Accelerator, model: nn.Module) -> dict[str, Tensor] | None:
    """Return all weights where no process has them; every process must call it."""
    if not is_sharded(accelerator):
        return None
    state: dict[str, Tensor] = accelerator.get_state_dict(model)
    return state
