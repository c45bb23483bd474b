"""The networks, as plain nn.Modules whose attribute names are the checkpoints' key names, and the tokenizer."""
