"""A vocabulary sharded over a process group: rank r holds classes r * n to (r + 1) * n of the size * n there are.

    maximum   the largest of all ranks' maxima
    sums      each rank's, rescaled to that maximum, added:  rest * exp(m_rank - m)
    target    the one rank that holds the class has it; the others add 0
    dx        the sum of each rank's G W_c, in float32

Every rank has the same input, target and class weights, and gets the same loss and dx; dW and dbias are its own part's.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from gptkern.operators.linear_cross_entropy.call import Call


def _resolved(name: str):
    return dist.distributed_c10d._resolve_process_group(name)


def all_classes(call: Call) -> int:
    """Classes of the whole vocabulary."""
    classes = call.linear_weight.shape[0]
    return classes if call.group is None else classes * _resolved(call.group).size()


def first_class(call: Call) -> int:
    """The class that this process's first row of the weight is."""
    return 0 if call.group is None else call.linear_weight.shape[0] * _resolved(call.group).rank()


def sum_over(name: str, tensor: torch.Tensor) -> None:
    """Adds all ranks' tensors, in place."""
    dist.all_reduce(tensor, group=_resolved(name))


def reduced(call: Call, statistics):
    """The statistics of the whole vocabulary from each rank's part of it.

    Raises:
        ValueError: the ranks' parts are not equally large. On a GPU, where nothing waits for the host, that is a
            device-side assertion.
    """
    group, classes = _resolved(call.group), call.linear_weight.shape[0]
    mine, rest, target, moment, smooth, largest, likeliest = statistics
    rows = mine.shape[0]
    # The sizes ride along: their maximum, and that of their negatives.
    sizes = mine.new_tensor([classes, -classes])
    joined = torch.cat((mine, sizes))
    dist.all_reduce(joined, dist.ReduceOp.MAX, group=group)
    maximum, most, least = joined[:rows], joined[rows], -joined[rows + 1]
    if joined.is_cpu:
        if most != least:
            raise ValueError(
                f"linear_cross_entropy: linear_weight has {classes} rows here, and of all processes of the group from "
                f"{int(least)} to {int(most)}; it needs as many on each"
            )
    else:
        torch._assert_async(most == least, "linear_cross_entropy: linear_weight needs as many rows on each process")
    # A rank whose logits are all -inf has nothing to rescale.
    shift = torch.where(mine == -torch.inf, 0.0, mine - maximum)
    scale = torch.exp(shift)
    sums = [rest * scale, target]
    if moment is not None:
        # sum exp(s - m) (s - m) = scale * (moment + (m_rank - m) * sum exp(s - m_rank)); the target's is in the moment
        at_home = (call.target >= first_class(call)) & (call.target < first_class(call) + classes)
        own = torch.where(at_home & (mine != -torch.inf), torch.exp(target - mine), 0.0)
        sums.append(scale * (moment + shift * (rest + own)))
    if smooth is not None:
        sums.append(smooth)
    summed = torch.stack(sums)
    dist.all_reduce(summed, group=group)
    summed = iter(summed.unbind())
    rest, target = next(summed), next(summed)
    moment = None if moment is None else next(summed)
    smooth = None if smooth is None else next(summed)
    if likeliest is not None:
        of_all = largest.clone()
        dist.all_reduce(of_all, dist.ReduceOp.MAX, group=group)
        # of equal ones the first
        likeliest = torch.where(largest == of_all, likeliest, torch.iinfo(torch.int64).max)
        dist.all_reduce(likeliest, dist.ReduceOp.MIN, group=group)
        largest = of_all
    return type(statistics)(maximum, rest, target, moment, smooth, largest, likeliest)
