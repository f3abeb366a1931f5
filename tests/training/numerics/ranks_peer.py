"""Run by test_training_ranks.py once for each rank (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT in its environment).

python ranks_peer.py FOLDER: trains every case on FOLDER/x.pt; the first rank writes what came of it."""

import json
import sys
from pathlib import Path

import torch

from tests.training.numerics.test_training_ranks import CASES, trained
from training.numerics.ranks import joined

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    x = torch.load(folder / "x.pt")
    with joined() as ranks:
        for case in CASES:
            result = trained(case, x, ranks)
            torch.save(result.sae.state_dict(), folder / f"{case}-{ranks.rank}.pt")
            if ranks.first:
                reports = [vars(report) for report in result.history]
                (folder / f"{case}.json").write_text(json.dumps({"history": reports, "tokens": result.tokens}))
