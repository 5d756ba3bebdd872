"""Stands in for `python -m kvc` in tests of the sweep: leaves a run folder at once, or when it is let go.

It waits as long as a file with the name of its folder lies in $STUB_HOLD; asked to end, it leaves a checkpoint.
"""

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path


def stub_config(argv: list[str]) -> dict[str, object]:
    """Configuration of a command line: its options by name."""
    return {key.removeprefix("--"): value for key, value in zip(argv[1::2], argv[2::2])}


def main(argv: list[str]) -> int:
    config = stub_config(argv)
    overwrite = config.pop("overwrite", None)
    run = Path(str(config["run_dir"]))
    last = run / "checkpoints" / "last.ckpt"
    begun = last.is_file() and not overwrite
    last.parent.mkdir(parents=True, exist_ok=True)
    there = run / "config.yaml"
    if there.is_file() and json.loads(there.read_text()) != config and not overwrite:
        print("stub: the folder belongs to another configuration", file=sys.stderr)
        return 2
    (run / "config.yaml").write_text(json.dumps(config))
    seen = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "SLURM_JOB_ID")}

    def stop(number: int, frame: object) -> None:
        last.write_text("half")
        sys.exit(0)

    signal.signal(signal.SIGTERM, stop)
    print(f"stub at work: {os.getpid()}", flush=True)
    while (Path(os.environ["STUB_HOLD"]) / run.name).exists():
        time.sleep(0.02)
    if config.get("fail"):
        print("stub: it went wrong", file=sys.stderr)
        return 1
    # The hash of kvc.runs without the cost of its imports.
    identity = json.dumps({key: value for key, value in config.items() if key != "run_dir"}, sort_keys=True)
    name = hashlib.sha256(identity.encode()).hexdigest()[:16]
    result = {"identity": name, "begun": begun, "seen": seen, "time": time.time()}
    (run / "result.json").write_text(json.dumps(result))
    print("stub done", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
