"""ComfyUI node "CQ Record Calibration": what the inputs of layers are like while a model samples.

Owns where ComfyUI lets a node look on (a wrapper around a whole sampling), and when the file is
written. Recording and the file are `cq.calibration`'s.

Source: ComfyUI `comfy/model_patcher.py` (`ModelPatcher.add_wrapper_with_key`),
`comfy/patcher_extension.py` (`WrappersMP.OUTER_SAMPLE`, `WrapperExecutor`), `comfy/samplers.py`
(`CFGGuider.sample`, whose guider is the executor's `class_obj`).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

_OUTER_SAMPLE = "outer_sample"  # comfy.patcher_extension.WrappersMP.OUTER_SAMPLE
_KEY = "cq_record_calibration"


class Recording:
    """A wrapper around samplings: records each, and writes the file after it. All samplings with
    one model count together; ComfyUI keeps the wrapper as long as the node's inputs stay."""

    def __init__(self, path: str, rank: int, rows_per_call: int) -> None:
        self._path, self._rank, self._rows = path, rank, rows_per_call
        self._model: Any = None
        self._recorder: Any = None

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a sampling and look on. What is interrupted is not written."""
        from cq.calibration import Recorder

        model = executor.class_obj.model_patcher.model.diffusion_model
        if self._recorder is None or self._model is not model:
            self._model = model
            self._recorder = Recorder(
                model,
                rank=self._rank,
                held_rank=max(1, self._rank // 2),
                rows_per_call=self._rows,
            )
        with self._recorder:
            found = executor(*args, **kwargs)
        self._recorder.save(self._path, force=True)
        return found


class CQRecordCalibration:
    """The node: MODEL in, MODEL out."""

    CATEGORY = "cq"
    DESCRIPTION = "Records the inputs of the model's layers while it samples, for `cq quant`."
    FUNCTION = "record"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802  # the name that ComfyUI asks for
        """The node's inputs."""
        number = {"min": 1, "max": 65536}
        return {
            "required": {
                "model": ("MODEL",),
                "path": ("STRING", {"default": "output/model.calib.safetensors"}),
            },
            "optional": {
                "rank": ("INT", {"default": 128, **number}),
                "rows_per_call": ("INT", {"default": 512, **number}),
                "overwrite": ("BOOLEAN", {"default": False}),
            },
        }

    def record(
        self,
        model: Any,
        path: str,
        rank: int = 128,
        rows_per_call: int = 512,
        overwrite: bool = False,
    ) -> tuple[Any]:
        """A clone of `model` that is recorded whenever it samples.

        Raises: ValueError if the file cannot be written, FileExistsError if it exists.
        """
        target = Path(os.path.expandvars(path.strip())).expanduser()
        if not path.strip() or target.is_dir() or not target.absolute().parent.is_dir():
            raise ValueError(f"no calibration can be written to `{path}`: name a file in a folder")
        if target.exists() and not overwrite:
            raise FileExistsError(
                f"`{path}` exists: name another file, or let the node overwrite it"
            )
        patched = model.clone()
        recording = Recording(str(target), rank, rows_per_call)
        patched.add_wrapper_with_key(_OUTER_SAMPLE, _KEY, recording)
        return (patched,)


NODE_CLASS_MAPPINGS: dict[str, type] = {"CQRecordCalibration": CQRecordCalibration}
NODE_DISPLAY_NAME_MAPPINGS = {"CQRecordCalibration": "CQ Record Calibration"}
