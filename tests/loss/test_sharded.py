"""FSDP2 with two processes on gloo."""

import os
import random
import socket
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("loss_sharded.py")


def test_head_sharded_by_fsdp2():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    seed = str(random.randrange(1 << 30))
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), seed],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], f"seed {seed}\n" + "\n".join(said)
