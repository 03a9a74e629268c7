"""`loramix bench serve`, as small as it gets: one server, a few seconds."""

import json
import subprocess
from pathlib import Path

from live import ENVIRONMENT, LORAMIX


def test_the_benchmark_of_serving_measures_and_records(model: Path, tmp_path: Path) -> None:
    command = [
        LORAMIX, "bench", "serve", "--model", str(model), "--part", "ttft,zipf", "--seconds-per-part", "12",
        "--work", str(tmp_path / "work"), "--out", str(tmp_path), "--plots", str(tmp_path),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "serve-cpu.json").read_text())
    figures = record["figures"]
    assert set(record["runs"]) == {"ttft", "zipf"}
    assert record["benchmark"] == "serve"
    assert "--part ttft,zipf" in record["command"]
    for kind in ("cold", "warm", "plain"):
        assert figures[f"ttft_ms_p50_{kind}"] > 0
    assert figures["zipf_tokens_per_s"] > 0
    assert 0 <= figures["zipf_slot_hit_rate"] <= 1
    assert (tmp_path / "serve-cpu-first-token.png").stat().st_size > 10_000
