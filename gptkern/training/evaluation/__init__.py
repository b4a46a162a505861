"""What a model is worth on text and on labelled data, in numbers with intervals."""
