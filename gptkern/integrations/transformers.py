"""Makes `attn_implementation="gptkern"` known to Hugging Face's transformers: `import gptkern.integrations.transformers`."""

import gptkern.swapping.transformers  # noqa: F401
