"""A swapped model's training step against a stock one's, in CPU time: python bench/swapped_step.py [ROUNDS]

The cost "swapped step" of `gptkern bench`. Exit status 1 where the ratio is above its limit.
"""

import sys

from gptkern.measuring import costs

step = costs.swapped_step(int(sys.argv[1]) if sys.argv[1:] else 200)
ours, stock, again = (of["median"] for of in (step["gptkern"], *step["peers"].values()))
ratio = ours / stock
print(f"stock {stock * 1e3:.2f} ms, swapped {ours * 1e3:.2f} ms, a second stock model {again / stock:.3f} x")
print(f"swapped / stock: {ratio:.3f}, limit {step['limit']}")
sys.exit(ratio > step["limit"])
