"""The sampler report: measurements (`measure`), their statistics (`statistics`), and the HTML page (`page`)."""
