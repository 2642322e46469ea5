"""A timm or torchvision model in, its layer stack and a rebuilt model of the kept layers out."""
