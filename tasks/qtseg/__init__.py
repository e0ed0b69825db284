"""2-D segmentation: QTSeg, its peers, and any backbone with any attention module, on your own images."""
