"""int8 linear layers in a model that was trained without them: quantize, load_quantized.

quantizing.py    quantize: a model's linear layers one after another
choosing.py      which layers become int8, and why the others do not
weights_read.py  layers of which a module's own code reads the weight
layers.py        where a model holds its layers, and how one takes the place of another
loading.py       load_quantized
refusing.py      state_dicts of the other kind, refused before anything is loaded
transformers.py  save_pretrained and from_pretrained of quantised models; imported only where transformers is in use
report.py        what quantize did, as data and as a table
"""

from gptkern.quantizing.loading import load_quantized
from gptkern.quantizing.quantizing import quantize
from gptkern.quantizing.report import QuantizeReport

__all__ = ["QuantizeReport", "load_quantized", "quantize"]
