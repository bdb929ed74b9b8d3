"""Memory follows the shard, not the model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "apply_memory.py"


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc/self/status")
def test_a_large_checkpoint_is_applied_in_little_memory(tmp_path: Path) -> None:
    """One file of 1.7 GB, of which ten shards are the easier case."""
    command = [sys.executable, str(SCRIPT), str(tmp_path), "10GB"]
    subprocess.run(command, check=True)
    report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert report["checkpoint_bytes"] > 1.5e9
    assert report["verified"]
    assert report["shards"] >= 6
    assert report["peak_above_imports_mb"] < 600
