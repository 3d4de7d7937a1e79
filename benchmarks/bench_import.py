"""What `import unsloth_ext` costs beyond the interpreter: it stands in front of everybody's `import unsloth`."""

import subprocess
import sys
import time

import record


def milliseconds(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    milliseconds("import unsloth_ext")  # writes the byte code
    bare, with_us = [], []
    for _ in range(31):  # in turns, so that both see the same machine
        bare.append(milliseconds("pass"))
        with_us.append(milliseconds("import unsloth_ext"))
    cost = [b - a for a, b in zip(bare, with_us, strict=True)]
    rows = [
        {"case": "python -c pass", "unit": "ms"} | record.percentiles(bare, 2),
        {"case": "python -c 'import unsloth_ext'", "unit": "ms"} | record.percentiles(with_us, 2),
        {"case": "difference", "unit": "ms"} | record.percentiles(cost, 2),
    ]
    record.write(
        "import", rows, [record.claim("foundation.import_ms", rows[2]["p50"], "ms", "<= 50", "the bare interpreter")]
    )


if __name__ == "__main__":
    main()
