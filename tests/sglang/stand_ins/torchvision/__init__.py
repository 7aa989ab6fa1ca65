"""Stand-in for torchvision, whose wheels need torch with CUDA: the names that SGLang and transformers import.

None of it works; no test processes images.
"""
