"""``python -m fuzz``: programs by the thousand, on several processes; ``--seed`` shows one."""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any

from fuzz.fuzzer import Counts, Found, run
from fuzz.workers import Worker


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("-n", type=int, default=2000, help="how many programs")
    parser.add_argument("--seed-start", type=int, default=0, help="the first one")
    parser.add_argument("--seed", type=int, help="this one only, made small")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--most", type=int, default=10, help="stop after so many failures of different kinds")
    args = parser.parse_args(argv)
    if args.seed is not None:
        found = run(args.seed)
        print(found or f"seed {args.seed}: as stock")
        return int(found is not None)
    stop, counts, start = args.seed_start + args.n, Counts(), time.monotonic()
    workers = [Worker(args.seed_start + i, stop, args.workers) for i in range(args.workers)]
    failures: dict[Any, Found | str] = {}
    total = torch_dies = 0
    try:
        while not all(w.done for w in workers) and len(failures) < args.most:
            time.sleep(0.05)
            for came in (came for w in workers for came in w.poll()):
                if isinstance(came, Counts):
                    counts.add(came)
                    continue
                if isinstance(came, str) and "stock" in came:
                    torch_dies += 1
                    print(came, flush=True)
                    continue
                total += 1
                key = came if isinstance(came, str) else came.signature
                if key not in failures:
                    failures[key] = came
                    print(f"{came}\n{'-' * 80}", flush=True)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    finally:
        for w in workers:
            w.stop()
    seconds = (time.monotonic() - start) * args.workers
    print(counts)
    each = seconds / max(1, counts.programs)
    print(f"{each:.3f} s of a core for each; torch dies of {torch_dies}; {total} fail, in {len(failures)} kinds")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
