"""What runs in each of the processes that tests/fsdp2/conftest.py starts."""

import datetime
import traceback
import warnings


def serve(pipe, cuda):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    while True:
        try:
            rank, world, store, job, arguments, patience = pipe.recv()
        except EOFError:
            return
        connected = False
        try:
            if cuda:
                torch.cuda.set_device(rank)
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if cuda else "gloo",
                init_method=f"file://{store}",
                rank=rank,
                world_size=world,
                timeout=datetime.timedelta(seconds=patience),
            )
            connected = True
            long = datetime.timedelta(seconds=300)  # far above what a test waits for on purpose
            dist.distributed_c10d._set_pg_timeout(long)
            dist.distributed_c10d._get_default_store().set_timeout(long)  # NCCL connects by it, late
            answer = ("ok", job(rank, world, **arguments))
        except BaseException:
            answer = ("error" if connected else "alone", traceback.format_exc())
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        pipe.send(answer)
