"""Visual-token reduction, one method a file; imported on first use."""

from __future__ import annotations

import importlib

_HOMES = {
    "VisionZip": "visionzip",
    "DivPrune": "divprune",
    "FastV": "fastv",
    "FasterVLM": "fastervlm",
    "PruMerge": "prumerge",
    "PruMergePlus": "prumerge",
    "PyramidDrop": "pyramiddrop",
    "SparseVLM": "sparsevlm",
    "VScan": "vscan",
    "VScanVision": "vscan",
    "VScanLLM": "vscan",
    "HiRED": "hired",
    "VTW": "vtw",
    "Feather": "feather",
    "VisPruner": "vispruner",
    "FitPrune": "fitprune",
    "BTP": "btp",
    "CDPruner": "cdpruner",
    "DART": "dart",
    "AdaptivePool": "pooling",
    "Pyramid": "pooling",
    "GGeM": "pooling",
    "PLLaVA": "pooling",
    "M3": "m3",
    "MQT": "mqt",
    "DynamicVLM": "dynamicvlm",
    "VideoCCAM": "videoccam",
    "TokenFLEX": "tokenflex",
    "TokenPacker": "tokenpacker",
    "ToMe": "tome",
    "HoloV": "holov",
    "VMTC": "vmtc",
    "CMAI": "cmai",
    "TopV": "topv",
    "WindowMerge": "mustdrop",
    "KeyTokens": "mustdrop",
    "DualFilter": "mustdrop",
    "OutputAware": "mustdrop",
    "MustDrop": "mustdrop",
    "PACT": "pact",
    "ZipVL": "zipvl",
    "RandomKV": "randomkv",
    "ZipVLPrefill": "zipvl",
    "ZipVLCache": "zipvl",
    "StreamingLLM": "streamingllm",
    "H2O": "h2o",
    "SnapKV": "snapkv",
    "PyramidKV": "snapkv",
    "AdaKV": "snapkv",
    "PrefixKV": "prefixkv",
    "VLCache": "vlcache",
    "PLPHP": "plphp",
    "LookM": "lookm",
    "KIVI": "kivi",
    "D2O": "d2o",
    "SkipVision": "skipvision",
    "XKV": "xkv",
    "ShadowKV": "shadowkv",
    "Random": "sanity",
    "RandomLLM": "sanity",
    "Stride": "sanity",
    "AvgPool": "sanity",
    "Downsample": "sanity",
    "DeepStack": "deepstack",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(f"mllm.compressors.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'mllm.compressors' has no attribute {name!r}")
