"""The effects that the papers report, measured on a pretrained model."""
