"""Everything that made the shipped folders, in order: base model, adapter, evaluation. About 45 minutes on one core::

python -m benchmarks.recall --out /tmp/recall
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

STEPS = """
train_base --out {out}/model --seconds {base_seconds}
train_adapter --model {out}/model --out {out}/adapter --seconds {adapter_seconds}
evaluate --model {out}/model --adapter {out}/adapter
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base-seconds", type=int, default=1500)
    parser.add_argument("--adapter-seconds", type=int, default=1200)
    args = parser.parse_args()
    for line in STEPS.strip().splitlines():
        module, *options = line.format(**vars(args)).split()
        subprocess.run([sys.executable, "-m", f"benchmarks.recall.{module}", *options], check=True)


if __name__ == "__main__":
    main()
