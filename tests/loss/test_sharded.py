"""FSDP2 with two processes on gloo."""

import os
import random
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("loss_sharded.py")


def test_head_sharded_by_fsdp2(tmp_path):
    seed = str(random.randrange(1 << 30))
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), seed, str(rank), str(tmp_path / "meeting")],
            env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=600)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], f"seed {seed}\n" + "\n".join(said)
