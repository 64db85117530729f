"""Training backbones for classification and segmentation."""
