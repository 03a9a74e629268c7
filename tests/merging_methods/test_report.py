"""The report, measured on Gram matrices, against dense matrices."""

import pytest
import torch
from reference.adapters import motley

from merging import MergeSpec, Term, merge
from merging.report import explain

ADAPTERS = {f"a{i}": adapter for i, (adapter, _) in enumerate(motley())}


@pytest.mark.parametrize("method", ["cat", "lego", "svd", "core-ties", "tsv", "iso"])
def test_report_is_what_dense_matrices_say(method):
    spec = MergeSpec.create(method, [Term("a0", 0.7), Term("a1", -1.3), Term.of("a2", {"*.q_proj": 0, "*": 0.4})])
    merged = merge(ADAPTERS, spec, dtype=torch.float32)
    for report in explain(ADAPTERS, spec):
        total = merged.modules[report.module].delta()
        u, sigma, v = torch.linalg.svd(total)
        real = int((sigma > 1e-5 * sigma[0]).sum())
        for name, overlap in report.sources.items():
            source = ADAPTERS[name].modules[report.module].delta()
            own, size = torch.linalg.norm(source), torch.linalg.norm(total)
            kept = torch.linalg.norm(u[:, :real].T @ source @ v[:real].T) ** 2
            assert overlap.energy == pytest.approx(float(kept / own**2), abs=1e-3)
            assert overlap.cosine == pytest.approx(float((total * source).sum() / own / size), abs=1e-4)
            assert overlap.gain == pytest.approx(float((total * source).sum() / own**2), abs=1e-3)


def test_progress_counts_every_module_once():
    done = []
    reports = explain(
        ADAPTERS, MergeSpec.create("cat", [Term("a0"), Term.of("a1", {"*.q_proj": 0, "*": 1})]), progress=done.append
    )
    assert sum(done) == len(reports) == len({*ADAPTERS["a0"].modules, *ADAPTERS["a1"].modules})
    assert len(done) > 1
