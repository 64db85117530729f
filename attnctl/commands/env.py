"""`attnctl env`: versions and kernels, to be pasted into a bug report."""

from __future__ import annotations

import platform
from dataclasses import dataclass

from attnctl.commands.common import Common, Result, table
from attnctl.provenance import RECORDED, hardware, versions

__all__ = ["Env"]

_PACKAGES = (*RECORDED, "timm", "accelerate", "safetensors", "huggingface_hub", "numpy", "Pillow")
_OPTIONAL = ("xformers", "opencv-python-headless", "triton", "peft", "matplotlib", "av", "gradio")


@dataclass(frozen=True, kw_only=True)
class Env(Common):
    """Show versions, the accelerator and which attention kernels run here, for bug reports."""

    def run(self, command: str) -> Result:
        """Collect the facts."""
        import torch

        from attnctl.kernels import backends

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
        rows = [(k["name"], "yes" if k["available"] else "no", k["reason"] or "") for k in kernels]
        text = "\n\n".join(
            [
                table(("package", "version"), list(packages.items())),
                table(("machine", ""), [(name, value) for name, value in machine.items() if value is not None]),
                table(("kernel", "runs", "why not"), rows),
            ]
        )
        return Result({"versions": packages, "machine": machine, "kernels": kernels}, text)
