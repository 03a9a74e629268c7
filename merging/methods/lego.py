"""lego: rank-wise clustering of the adapters' units."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from merging.assembly import Mixed
from merging.errors import RecipeError, shown
from merging.kmeans import kmeans, means
from merging.methods.rank_options import RankOptions, merged_rank
from merging.methods.registry import method
from merging.pool import Pool


@dataclass(frozen=True)
class LegoOptions(RankOptions):
    """Options of lego; docs/methods.md says which are the paper's and which are left open by it.

    rank: number of clusters k; the largest rank of the adapters if not given.
    norm: the norm that parameter reweighting restores ("inf", as its implementations do, or "2").
    output: the output reweighting: "sqrt-r/k" with r the mean source rank, "sqrt-n/k" with n the number of units, or "none".
    labels: cluster the units as they are ("raw") or with a and b brought to length 1 ("unit").
    canonical: first remove the freedom of sign and scale of each unit: (a, b) ~ (−a, −b) ~ (ca, b/c).
    restarts, rounds, seed: of k-means.
    """

    method = "lego"
    norm: Literal["inf", "2"] = "inf"
    output: Literal["sqrt-r/k", "sqrt-n/k", "none"] = "sqrt-r/k"
    labels: Literal["raw", "unit"] = "raw"
    canonical: bool = False
    restarts: int = 4
    rounds: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, top in (("restarts", 64), ("rounds", 300)):
            if not 1 <= getattr(self, name) <= top:
                raise RecipeError(f"{name}={shown(getattr(self, name))} of lego; use 1 to {top}", name)
        if not 0 <= self.seed < 2**63:
            raise RecipeError(f"seed={shown(self.seed)} of lego; use 0 to 2^63 − 1", "seed")


@method("lego", version=1, options=LegoOptions, rank=merged_rank, number="rank")
def lego(pool: Pool, options: LegoOptions) -> Mixed:
    """k-means on the units s = [a; b] of all adapters; the clusters' means are the merged units.

    √|w c| is folded into both sides of each unit, and the sign of w into b. Each mean is then rescaled to the mean
    norm of its members (parameter reweighting), and ΔW by √(r/k) (output reweighting).

    Source: LoRA-LEGO (Zhao et al., ICLR 2025); the folding of weights is ours.
    """
    k = merged_rank(pool.ranks, options)
    fold_a_LN, fold_b_LN = _fold(pool, options)
    mean_LKN = means(clusters(pool, options), k)

    mean_rank = sum(pool.ranks) / len(pool.ranks)
    gain = {"sqrt-r/k": mean_rank / k, "sqrt-n/k": pool.units / k, "none": 1.0}[options.output] ** 0.25  # on each side
    if options.norm == "inf":  # the norm of the means is known only once they are formed
        norm_LN = torch.maximum(fold_a_LN.abs() * pool.peak_a_LN, fold_b_LN.abs() * pool.peak_b_LN)
        peak_LK = gain * (mean_LKN @ norm_LN[:, :, None]).squeeze(2)
        return Mixed(mean_LKN * fold_a_LN[:, None, :], mean_LKN * fold_b_LN[:, None, :], peak_LK)
    gram_LNN = _joint_gram(pool, fold_a_LN, fold_b_LN)
    norm_LN = gram_LNN.diagonal(dim1=1, dim2=2).sqrt()
    own_LK = ((mean_LKN @ gram_LNN) * mean_LKN).sum(dim=2).clamp_(min=0).sqrt()
    wanted_LK = gain * (mean_LKN @ norm_LN[:, :, None]).squeeze(2)
    mean_LKN = mean_LKN * torch.where(own_LK > 0, wanted_LK / own_LK, 0.0)[:, :, None]
    return Mixed(mean_LKN * fold_a_LN[:, None, :], mean_LKN * fold_b_LN[:, None, :])


def clusters(pool: Pool, options: LegoOptions) -> Tensor:
    """(L, N) int64: the cluster of each unit."""
    fold_a_LN, fold_b_LN = _fold(pool, options)
    if options.labels == "unit":
        fold_a_LN, fold_b_LN = _to_length_one(fold_a_LN, pool.gram_a_LNN), _to_length_one(fold_b_LN, pool.gram_b_LNN)
    gram_LNN = _joint_gram(pool, fold_a_LN, fold_b_LN)
    k = merged_rank(pool.ranks, options)
    return kmeans(gram_LNN, k, restarts=options.restarts, rounds=options.rounds, seed=options.seed)


def _fold(pool: Pool, options: LegoOptions) -> tuple[Tensor, Tensor]:
    """What to multiply each unit's a and b with: √|w c| on both, the sign of w c on b; canonicalised if asked."""
    root_LN = pool.coefficient_LN.abs().sqrt()
    fold_a_LN, fold_b_LN = root_LN, root_LN * pool.coefficient_LN.sign()
    if not options.canonical:
        return fold_a_LN, fold_b_LN
    norm_a_LN = pool.gram_a_LNN.diagonal(dim1=1, dim2=2).sqrt()
    norm_b_LN = pool.gram_b_LNN.diagonal(dim1=1, dim2=2).sqrt()
    balance_LN = (norm_b_LN / norm_a_LN).sqrt()
    balance_LN = torch.where((norm_a_LN > 0) & (norm_b_LN > 0), balance_LN, 1.0) * torch.where(pool.sign_a_LN < 0, -1.0, 1.0)
    return fold_a_LN * balance_LN, fold_b_LN / balance_LN


def _to_length_one(fold_LN: Tensor, gram_LNN: Tensor) -> Tensor:
    """Factors of the same signs that bring each vector to length 1; zero vectors stay zero."""
    norm_LN = gram_LNN.diagonal(dim1=1, dim2=2).sqrt()
    return fold_LN.sign() * torch.where(norm_LN > 0, 1 / norm_LN, 0.0)


def _joint_gram(pool: Pool, fold_a_LN: Tensor, fold_b_LN: Tensor) -> Tensor:
    """The Gram matrix of the units [a; b] with each side multiplied by its factors."""
    if pool.gram_a_LNN.is_cuda:
        from merging.cuda_kmeans import joint_gram  # Triton is there with CUDA only

        return joint_gram(pool.gram_a_LNN, pool.gram_b_LNN, fold_a_LN, fold_b_LN)
    gram_a_LNN = fold_a_LN[:, :, None] * pool.gram_a_LNN * fold_a_LN[:, None, :]
    return gram_a_LNN + fold_b_LN[:, :, None] * pool.gram_b_LNN * fold_b_LN[:, None, :]
