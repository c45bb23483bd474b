"""The record that a picture carries: our own (`record`), A1111's text (`infotext`), other programs' metadata."""
