"""What Hugging Face's transformers knows by name: importing it is all there is to do.

attn_implementation="gptkern"       attention
quant_method "gptkern"              from_pretrained of a model that gptkern.quantize and save_pretrained went through
"""

import gptkern.quantizing.transformers
import gptkern.swapping.transformers  # noqa: F401
