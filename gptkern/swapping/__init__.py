"""Kernels put into models that exist: swap, unswap, kernels.

swapping.py        swap, unswap and kernels themselves
plan.py            what is swapped: decided for a whole model, and carried out
originals.py       what a swapped module was
twins.py           what takes the place of what: the one map of operators
reading.py         what a class's forward calls, read off its bytecode
rerouting.py       a class's forward again, with some of the functions that it calls replaced
rerouting_code.py  the code that this needs: some of its names lead to cells
routed_classes.py  the subclass of a module's class that has such a forward
encoders.py        what torch.nn's encoders give on their fast path, in those that are rerouted
edits.py           what of a forward is changed in its source
activations.py     activations, and products with them
fused_loss.py      the loss of a model's own forward, without its logits: what it calls
loss_code.py       where a forward takes its loss, read off its source
loss_change.py     the same source without the logits
logits_code.py     what is done with the logits before it, as far as the hidden states can stand in for them
harmless_code.py   statements that are known to write nothing
edited_code.py     a function's code again, changed in its source
transformers.py    attention by name in Hugging Face's models; imported only where transformers is in use
known_code.py      norms and rotary embeddings that these write out, known by their code
attention_names.py which code of such a model asks for the name of its attention
attention_functions.py  which functions stand under that name, and whether they are those whose place gptkern takes
explaining.py      which backend would run what a model calls
report.py          what a swap did, as data and as a table
"""

from gptkern.swapping.explaining import ExplainReport, explain
from gptkern.swapping.report import SwapReport, UnswapReport
from gptkern.swapping.swapping import kernels, swap, unswap
from gptkern.swapping.twins import SWAPPABLE

__all__ = ["SWAPPABLE", "ExplainReport", "SwapReport", "UnswapReport", "explain", "kernels", "swap", "unswap"]
