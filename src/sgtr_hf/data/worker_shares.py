"""How the workers of a loader share the batches of a stream."""

from torch.utils.data import get_worker_info


def images_of_this_worker(num_batches: int, batch_size: int) -> int:
    """Count the images that this worker owes in an epoch; all of them outside a worker.

    A loader takes a batch of each worker in turn, so the first workers owe one batch more where
    they do not share evenly.

    Args:
        num_batches: Of this process in an epoch.
        batch_size: Images of a batch.
    """
    worker = get_worker_info()
    if worker is None:
        return num_batches * batch_size
    whole, rest = divmod(num_batches, worker.num_workers)
    return (whole + int(worker.id < rest)) * batch_size
