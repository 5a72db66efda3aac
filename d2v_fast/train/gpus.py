"""Peak rates of GPUs, as their data sheets give them: what MFU is a share of."""

import re

# TFLOP/s of dense bfloat16 products. Versions of a model are told apart by a second word; "" is the one without any.
PEAKS: dict[str, float | dict[str, float]] = {
    "A10": 125,
    "A30": 165,
    "A100": 312,
    "A800": 312,
    "L4": 121,
    "L40": 181,
    "L40S": 362,
    "H100": {"HBM3": 989, "SXM5": 989, "PCIE": 756, "NVL": 835},
    "H200": {"": 989, "NVL": 835},
    "GH200": 989,
    "H20": 148,
    "B200": 2250,
}


def peak_tflops(name: str) -> float | None:
    """TFLOP/s of dense bfloat16 products of the GPU that ``torch.cuda.get_device_name`` calls so; None if unknown.

    Part of a GPU (MIG), and versions that are not in the table, are unknown: no number is better than a wrong one.
    """
    words = re.split(r"[^A-Z0-9]+", name.upper())
    known = next((PEAKS[word] for word in words if word in PEAKS), None)
    if isinstance(known, dict):
        known = next((peak for version, peak in known.items() if version in words), known.get(""))
    return None if known is None or "MIG" in words else float(known)
