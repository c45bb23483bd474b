"""The sampler report: measurements (`measure`), their statistics (`statistics`), and the report's files (`page`)."""
