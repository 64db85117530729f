"""`attnctl env`: versions and kernels, to be pasted into a bug report."""

from __future__ import annotations

import platform
from dataclasses import dataclass

from attnctl.app.commands.common import Common, Result, importing, table
from attnctl.data.provenance import hardware, versions

__all__ = ["Env"]

_PACKAGES = ("attnctl", "torch", "diffusers", "safetensors", "huggingface_hub", "numpy", "Pillow")
_OPTIONAL = (
    "transformers",
    "timm",
    "accelerate",
    "xformers",
    "opencv-python-headless",
    "triton",
    "peft",
    "matplotlib",
    "av",
    "gradio",
)


@dataclass(frozen=True, kw_only=True)
class Env(Common):
    """Show versions, the accelerator and which attention kernels run here, for bug reports."""

    def run(self, command: str) -> Result:
        """Collect the facts."""
        importing("torch")
        import torch

        from attnctl.kernels import backends
        from attnctl.kernels.sparse.dispatch import sparse_backends
        from attnctl.kernels.xformers import mismatch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        packages = versions(_PACKAGES, _OPTIONAL)
        machine = {
            "platform": platform.platform(),
            "device": device,
            "hardware": hardware(device),
            "cuda": torch.version.cuda if device == "cuda" else None,
            "threads": torch.get_num_threads(),
        }
        kernels = [{"name": k.name, "available": k.available, "reason": k.reason} for k in backends(device).values()]
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        sparse = [
            {"name": name, "available": not reason, "reason": reason}
            for name, reason in sparse_backends(device, dtype).items()
        ]
        rows = [(k["name"], "yes" if k["available"] else "no", k["reason"] or "") for k in kernels]
        plans = [(k["name"], "yes" if k["available"] else "no", k["reason"] or "") for k in sparse]
        text = "\n\n".join(
            [
                table(("package", "version"), list(packages.items())),
                table(("machine", ""), [(name, value) for name, value in machine.items() if value is not None]),
                table(("kernel", "runs", "why not"), rows),
                table(("block plans", "runs", "why not"), plans),
            ]
        )
        unfit = mismatch()
        if unfit:
            text += f"\n\nxformers: {unfit}."
        facts = {
            "versions": packages,
            "mismatch": unfit or None,
            "machine": machine,
            "kernels": kernels,
            "block_sparse_kernels": sparse,
        }
        return Result(facts, text)
