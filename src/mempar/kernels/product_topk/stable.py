"""torch.topk with a rule for ties: the lowest key wins.

torch.topk leaves the order of equal values open, so two layouts of one model could choose
different slots. Ties are rare, so they are found first and only those rows are sorted in full.
"""

import torch
from torch import Tensor


def stable_topk(values: Tensor, top_k: int, tie_key: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the k largest values and their positions, ordered by (value descending, tie key ascending).

    Args:
        values: `[..., N]`.
        top_k: k, at most N.
        tie_key: `[..., N]` integers; equal values are ordered by it. By default the position.

    Returns:
        Values and positions `[..., k]`.
    """
    # One value more than asked for shows whether the last place is contested.
    best, position = torch.topk(values, min(top_k + 1, values.shape[-1]), dim=-1)
    tied = (best[..., 1:] == best[..., :-1]).any(-1)
    best, position = best[..., :top_k].contiguous(), position[..., :top_k].contiguous()
    if bool(tied.any()):
        rows = values[tied]
        if tie_key is None:
            sorted_rows, order = torch.sort(rows, dim=-1, descending=True, stable=True)
        else:
            by_key = tie_key[tied].argsort(dim=-1)
            sorted_rows, order = torch.sort(rows.gather(-1, by_key), dim=-1, descending=True, stable=True)
            order = by_key.gather(-1, order)
        best[tied], position[tied] = sorted_rows[..., :top_k], order[..., :top_k]
    return best, position
