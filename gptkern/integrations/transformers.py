"""Makes `attn_implementation="gptkern"` known to Hugging Face's transformers: importing it is all there is to do."""

import gptkern.swapping.transformers  # noqa: F401
